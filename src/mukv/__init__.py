"""mukv: a JAX laboratory for transformers with a small memory."""

__version__ = "0.1.0"
