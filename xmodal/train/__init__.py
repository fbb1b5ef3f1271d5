"""Training: state, step, optimiser, checkpoints, evaluation, and the loop around them."""
