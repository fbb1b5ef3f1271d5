"""Measurements that anyone can repeat: `python -m xmodal.bench.NAME`."""
