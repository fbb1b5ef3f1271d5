"""Paths given by users."""

import os
import re

from xmodal import storage
from xmodal.errors import UserError

_REMOTE = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')


def local(path: str | os.PathLike, name: str) -> str:
  """The absolute path of a file or folder on this machine, `~` replaced by the home folder.

  Args:
    path: as the user wrote it.
    name: name of the setting, for messages ('--workdir').

  Raises:
    UserError: it is a URL (gs://, s3://, hf://, ...), or not a valid file name.
  """
  path = os.fspath(path)
  if _REMOTE.match(path):
    raise UserError(f'{name} {path}: has to be on this machine; copy the files here, or mount them')
  if '\0' in path or not _is_utf8(path):
    raise UserError(f'{name} {path!a}: its name is not UTF-8; rename it, or give another')
  if (path == '~' or path.startswith('~/')) and not home():
    raise UserError(f'{name} {path}: this user has no home folder; give the whole path')
  return os.path.abspath(os.path.expanduser(path))


def resolved(path: str | os.PathLike, name: str) -> str:
  """As `local`, but also accepts addresses of buckets, without a slash at their end.

  Raises:
    UserError: as local, or the address is of a kind that is not read, or lacks its package.
  """
  path = os.fspath(path)
  if not _REMOTE.match(path):
    return local(path, name)
  storage.check(path, name)
  return path.rstrip('/')


def home() -> str:
  """The user's home folder; '' if there is none."""
  # Without HOME and an entry in the user database, `~` is left unchanged.
  folder = os.path.expanduser('~')
  return folder if os.path.isabs(folder) and folder != os.devnull else ''


def _is_utf8(text):
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def cache(name: str) -> str | None:
  """A writable folder in the user's cache, $XDG_CACHE_HOME or ~/.cache; None if there is none."""
  own = home()
  for base in (os.environ.get('XDG_CACHE_HOME', ''), own and os.path.join(own, '.cache')):
    if os.path.isabs(base):
      folder = os.path.join(base, 'xmodal', name)
      try:
        os.makedirs(folder, exist_ok=True)
      except OSError:
        continue
      if os.access(folder, os.W_OK | os.X_OK):
        return folder
  return None
