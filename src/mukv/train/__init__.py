"""Training: the step, the loop around it, metrics, the plan."""
