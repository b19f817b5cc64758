"""Files that are written whole or not at all: weights, checkpoints, JSON; and folder locks."""
