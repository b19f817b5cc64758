"""Training: one step, the loop around it, metrics."""
