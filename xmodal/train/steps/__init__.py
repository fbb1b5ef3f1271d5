"""One step: state, losses, gradients, update."""
