"""Files and folders that are written whole or not at all, whatever ends the program."""

from collections.abc import Iterator
import contextlib
import os
import shutil
from typing import IO


@contextlib.contextmanager
def written(path: str, mode: str = 'w') -> Iterator[IO]:
  """A file to write into; it takes the place of `path` once all of it lies on the disk.

  Args:
    path: of the file; `path`.part holds what is not complete yet.
    mode: 'w' for text in UTF-8, 'wb' for bytes.
  """
  part = f'{path}.part'
  with open(part, mode, encoding=None if 'b' in mode else 'utf-8') as f:
    yield f
    f.flush()
    # A file that was renamed before its bytes were on the disk is empty after a power cut.
    os.fsync(f.fileno())
  os.replace(part, path)


@contextlib.contextmanager
def written_folder(path: str) -> Iterator[str]:
  """A new folder to write into; it takes the place of `path` once all of it lies on the disk."""
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
  """Returns when the bytes of a file lie on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
