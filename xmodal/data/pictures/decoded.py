"""Pictures of one batch, each decoded once, in threads."""

from collections.abc import Sequence
import concurrent.futures

import numpy as np

from xmodal.data.pictures import images
from xmodal.errors import UserError


class DecodedPictures:
  """The `decode` of a Predictor, which decodes a picture once for several queries, in threads."""

  def __init__(self):
    self._pictures: dict[str, images.Decoded] = {}

  def open(self, paths: Sequence[str], size: int) -> dict[str, str]:
    """Opens these in place of those before, for a model's input of size x size pixels.

    Returns what is wrong with those that cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:  # decoders run outside the GIL
      found = dict(zip(paths, pool.map(lambda path: _decode(path, (size, size)), paths)))
    self._pictures = {path: it for path, it in found.items() if not isinstance(it, str)}
    return {path: it for path, it in found.items() if isinstance(it, str)}

  def __call__(self, source: str | np.ndarray, size: tuple[int, int]) -> images.Decoded:
    known = self._pictures.get(source) if isinstance(source, str) else None
    return known or images.decode(source, size)


def _decode(path, size):
  """A picture, or what is wrong with it."""
  try:
    return images.decode(path, size)
  except UserError as error:
    return str(error)
