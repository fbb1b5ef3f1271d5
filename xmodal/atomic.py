"""Writes files and folders atomically: completely or not at all, even if the program is killed."""

from collections.abc import Iterator
import contextlib
import os
import shutil
from typing import IO


@contextlib.contextmanager
def written(path: str, mode: str = 'w') -> Iterator[IO]:
  """Opens a file that replaces `path` once it is completely on disk.

  Args:
    path: path of the file; until it is complete, it is written to `path`.part.
    mode: 'w' for text in UTF-8, 'wb' for bytes.
  """
  part = f'{path}.part'
  with open(part, mode, encoding=None if 'b' in mode else 'utf-8') as f:
    yield f
    f.flush()
    # Without fsync before the rename, the file may be empty after a power cut.
    os.fsync(f.fileno())
  os.replace(part, path)


@contextlib.contextmanager
def written_folder(path: str) -> Iterator[str]:
  """Makes a new folder that replaces `path` once it is completely on disk."""
  part = f'{path}.part'
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(part)
  yield part
  for folder, _, names in os.walk(part):
    for name in names:
      sync(os.path.join(folder, name))
  if os.path.isdir(path):
    shutil.rmtree(path)
  os.rename(part, path)


def sync(path: str) -> None:
  """Flushes a file's bytes to disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
