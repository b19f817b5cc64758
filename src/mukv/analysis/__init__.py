"""Measure the attention weights of a trained model, by layer and head."""
