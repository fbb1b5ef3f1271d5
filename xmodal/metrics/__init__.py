"""Metrics in numpy, as officially defined: from predictions and ground truth to scores."""
