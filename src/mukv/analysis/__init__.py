"""Measurements of the attention weights of a trained model, by layer and head."""
