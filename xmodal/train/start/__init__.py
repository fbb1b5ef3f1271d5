"""Initial parameters of a new run: from pretrained towers or an earlier run."""
