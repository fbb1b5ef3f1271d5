"""Training: state, step, optimizer, checkpoints, evaluation, and the loop around them."""
