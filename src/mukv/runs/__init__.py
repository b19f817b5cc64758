"""The run directory, and a model that is loaded from it."""
