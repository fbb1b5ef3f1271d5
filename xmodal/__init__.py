"""xmodal: one model that looks and reads, trained on many tasks together."""

__version__ = '0.1.0'
