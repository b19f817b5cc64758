"""Training: the training step, the loop, metrics, checkpoints and the section `train`."""
