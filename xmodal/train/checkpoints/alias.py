"""Names of folders that Orbax and TensorStore take as they are."""

import os
import re

from xmodal.errors import UserError

# Orbax looks for files by patterns that begin with the folder's name, and TensorStore takes a
# backslash for the end of a folder's name: what was saved could not be read.
_SPECIAL = re.compile(r'[*?\[\\]')
_DESCRIPTORS = '/proc/self/fd'


class Usable:
  """Enters with a path that means a folder and has no special characters, valid until it exits."""

  def __init__(self, folder: str):
    """Of a folder, which is made if it is not there and its own path has such characters."""
    self._folder, self._descriptor = folder, None

  def __enter__(self) -> str:
    """Raises UserError if this system has no other path for the folder."""
    if not _SPECIAL.search(self._folder):
      return self._folder
    if not os.path.isdir(_DESCRIPTORS):
      raise UserError(f'{self._folder}: on this system no checkpoint can be in a path with one of '
                      '* ? [ \\; take a folder with another name')
    os.makedirs(self._folder, exist_ok=True)
    self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
    return f'{_DESCRIPTORS}/{self._descriptor}'

  def __exit__(self, *_):
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None
