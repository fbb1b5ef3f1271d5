"""Folder paths without characters that Orbax and TensorStore treat as special."""

import os
import re

from xmodal import storage
from xmodal.errors import UserError

# Orbax uses folder names in glob patterns, and TensorStore reads a backslash as a path separator:
# saved arrays could not be read back.
_SPECIAL = re.compile(r'[*?\[\\]')
_DESCRIPTORS = '/proc/self/fd'


class SafePath:
  """Context manager: a path to a folder without special characters, valid until exit."""

  def __init__(self, folder: str):
    """folder: created on entry if its own path has special characters."""
    self._folder, self._descriptor = folder, None

  def __enter__(self) -> str:
    """Raises UserError if this system has no other path for the folder."""
    if storage.is_remote(self._folder) or not _SPECIAL.search(self._folder):
      return self._folder
    if not os.path.isdir(_DESCRIPTORS):
      raise UserError(f'{self._folder}: on this system a checkpoint path cannot contain '
                      '* ? [ \\; use a folder with another name')
    os.makedirs(self._folder, exist_ok=True)
    self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
    return f'{_DESCRIPTORS}/{self._descriptor}'

  def __exit__(self, *_):
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None
