"""Search hyperparameters, and test whether they transfer across widths."""
