"""Where metrics go besides metrics.jsonl; see tracker.py."""
