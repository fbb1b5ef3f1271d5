"""Outputs of commands: files and folders, on this machine or in a bucket."""

from collections.abc import Iterator
import contextlib
import os
import shutil
import tempfile

from xmodal import storage
from xmodal.errors import UserError


def check_folder(path: str) -> None:
  """Raises UserError if no file can be made at --output `path`, because its folder is not there."""
  if storage.is_remote(path):
    storage.check_bucket(os.path.dirname(path))
  elif not os.path.isdir(os.path.dirname(os.path.abspath(path))):
    raise UserError(f'--output {path}: no such folder')


@contextlib.contextmanager
def on_this_machine(path: str) -> Iterator[str]:
  """A path to write a file or a new folder to: `path` itself, or one that is uploaded at the end.

  What cannot be uploaded is kept, and the error says where.
  """
  if not storage.is_remote(path):
    yield path
    return
  folder = tempfile.mkdtemp(prefix='xmodal-')
  own = os.path.join(folder, os.path.basename(path))
  try:
    yield own
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  names = [''] if os.path.isfile(own) else [
      os.path.relpath(os.path.join(place, name), own)
      for place, _, files in os.walk(own) for name in files]
  try:
    storage.copy_all(storage.upload, ((os.path.join(own, name) if name else own,
                                       f'{path}/{name}'.rstrip('/')) for name in names))
  except (UserError, OSError) as error:
    raise UserError(f'--output {path} cannot be uploaded ({error}); what was made is in {own}'
                    ) from error
  shutil.rmtree(folder, ignore_errors=True)
