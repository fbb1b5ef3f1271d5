"""Keeps decoded pictures in memory, so that a small data set is decoded once."""

from collections.abc import Hashable
import threading

import numpy as np

from xmodal.data.example import Example, Packed
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
    self._kept: dict[Hashable, images.Decoded] = {}

  def part(self, count: int) -> 'KeepDecoded':
    """An empty cache with a share of the room, for each of `count` processes."""
    return self if count == 1 else KeepDecoded(self._room // count)

  def __reduce__(self):
    return KeepDecoded, (self._room,)

  def __call__(self, source: str | bytes | Packed | np.ndarray,
               size: tuple[int, int]) -> images.Decoded:
    """As `images.decode`; pixels given as an array are not kept."""
    if isinstance(source, np.ndarray):
      return images.decode(source, size)
    key = Example(source).picture, tuple(size)
    picture = self._kept.get(key)
    if picture is None:
      picture = images.decode(source, size)
      with self._lock:
        if key not in self._kept and picture.pixels.nbytes <= self._room:
          self._room -= picture.pixels.nbytes
          self._kept[key] = picture
    return picture
