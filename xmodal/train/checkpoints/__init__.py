"""Checkpoints: atomic writes, damage checks, reading."""

import os

# Orbax reads and writes gs:// through TensorFlow where that is installed, else through fsspec as we
# do. Has to be set before the first use of a path.
os.environ.setdefault('EPATH_USE_TF', 'false')
