"""Searching for hyperparameters and checking that they transfer across widths."""
