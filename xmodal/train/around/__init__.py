"""What happens around the steps of training; see train.loop."""
