"""Measurements that anyone can repeat: `xmodal bench NAME`, or `python -m xmodal.bench.NAME`."""
