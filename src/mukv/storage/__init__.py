"""Files that are whole or not there: weights, checkpoints."""
