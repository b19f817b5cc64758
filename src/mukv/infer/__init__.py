"""Inference: decoding and evaluation."""
