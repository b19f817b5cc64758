"""Using a model: decoding and evaluation."""
