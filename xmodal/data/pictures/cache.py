"""Keeps decoded pictures in memory, so that a small data set is decoded once."""

import hashlib
import threading

import numpy as np

from xmodal.data.pictures import images


class KeepDecoded:
  """`images.decode` with a cache, which keeps decoded pictures until it is full.

  A small data set is then decoded once and not once an epoch. Nothing is evicted:
  every epoch reads every picture, so the first ones are as good as any.
  """

  def __init__(self, max_bytes: int):
    """Keeps up to max_bytes of pixels."""
    self._room = max_bytes
    self._lock = threading.Lock()
    self._kept: dict[tuple, images.Decoded] = {}

  def __call__(self, source: str | bytes | np.ndarray, size: tuple[int, int]) -> images.Decoded:
    """As `images.decode`; pixels given as an array are not kept."""
    if isinstance(source, np.ndarray):
      return images.decode(source, size)
    # Not the bytes: they would be kept, too.
    name = (hashlib.blake2b(source, digest_size=16).digest() if isinstance(source, bytes)
            else source)
    key = (name, tuple(size))
    picture = self._kept.get(key)
    if picture is None:
      picture = images.decode(source, size)
      with self._lock:
        if key not in self._kept and picture.pixels.nbytes <= self._room:
          self._room -= picture.pixels.nbytes
          self._kept[key] = picture
    return picture
