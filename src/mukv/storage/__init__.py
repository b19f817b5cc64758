"""Read and write files atomically: weights, checkpoints, JSON; and lock folders."""
