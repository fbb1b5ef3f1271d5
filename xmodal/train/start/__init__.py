"""What a new run begins with: pretrained towers, parameters of an earlier run."""
