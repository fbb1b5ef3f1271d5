"""What a run logs: terminal, metrics.jsonl, TensorBoard."""
