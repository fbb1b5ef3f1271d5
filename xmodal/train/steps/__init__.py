"""The training step: state, losses, gradients, update."""
