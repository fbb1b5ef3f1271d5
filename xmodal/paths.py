"""Paths that people give."""

import os
import re

from xmodal.errors import UserError

_REMOTE = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')


def local(path: str, name: str) -> str:
  """The absolute path of a file or folder on this machine, `~` replaced by the home folder.

  Args:
    path: as a person wrote it.
    name: what it is of, for messages ('--workdir').

  Raises:
    UserError: it is an address (gs://, s3://, hf://, ...), or no file can have that name.
  """
  if _REMOTE.match(path):
    raise UserError(f'{name} {path}: addresses are not read or written yet; wanted a path on this '
                    'machine: copy the files here, or mount them')
  if '\0' in path or not _is_utf8(path):
    raise UserError(f'{name} {path!a}: no name in UTF-8; rename it, or give another')
  full = os.path.expanduser(path)
  if full.startswith('~') and (full == '~' or full.startswith('~/')):
    raise UserError(f'{name} {path}: this user has no home folder; give the whole path')
  return os.path.abspath(full)


def _is_utf8(text):
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True
