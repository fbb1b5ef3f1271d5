"""What a run logs: terminal, metrics.jsonl, trackers, speed, goodput."""
