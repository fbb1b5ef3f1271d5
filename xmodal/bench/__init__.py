"""Benchmarks to repeat: `xmodal bench NAME`, or `python -m xmodal.bench.NAME`."""
