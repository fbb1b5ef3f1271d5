"""Copies of folders of buckets in the user's cache, for what reads files of this machine only.

A copy is named by its address and the versions of its files: what has not changed is downloaded
once. Copies that nothing has opened for 30 days are deleted at the next download. The folder
`buckets` of the cache may be deleted at any time when nothing uses it.
"""

import atexit
from collections.abc import Callable, Iterable
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time

from xmodal import paths, storage

_KEPT = 30 * 24 * 3600  # seconds
_SAID = 2**20  # bytes from which a download is announced


def copy(address: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
  """A folder of this machine with the files of a bucket's folder; empty if there are none.

  Args:
    address: the folder in a bucket.
    wanted: whether to copy a file, by its name relative to the folder.

  Raises:
    UserError: the bucket cannot be read.
  """
  entries = {name: entry for name, entry in storage.entries(address).items() if wanted(name)}
  if not entries:
    storage.check_bucket(address)
  key = hashlib.sha256(json.dumps([address, entries]).encode()).hexdigest()[:12]
  folder = os.path.join(_base(), f'{readable(address)}-{key}')
  if os.path.isdir(folder):
    os.utime(folder)
    return folder
  _delete_unused(_base())
  size = sum(entry.size for entry in entries.values())
  if size >= _SAID:
    print(f'downloading {address}: {len(entries)} files, {size / 2**20:,.0f} MB', file=sys.stderr,
          flush=True)
  with tempfile.TemporaryDirectory(dir=_base(), ignore_cleanup_errors=True) as part:
    part = os.path.join(part, 'part')
    os.makedirs(part)
    download(address, entries, part)
    try:
      os.rename(part, folder)
    except OSError:
      if not os.path.isdir(folder):  # another process was quicker
        raise
  return folder


def download(address: str, names: Iterable[str], folder: str) -> None:
  """Copies files of a bucket's folder, by their names relative to it, into a local folder.

  Each file appears there whole or not at all.
  """
  def whole(path, local):
    part = f'{local}.{os.getpid()}.part'
    storage.download(path, part)
    os.replace(part, local)

  names = list(names)
  for place in {os.path.dirname(name) for name in names}:
    os.makedirs(os.path.join(folder, place), exist_ok=True)
  storage.copy_all(whole, ((f'{address}/{name}', os.path.join(folder, name)) for name in names))


def _delete_unused(folder):
  """Deletes old copies, and parts of downloads that were killed."""
  for entry in os.scandir(folder):
    if entry.is_dir(follow_symlinks=False) and entry.stat().st_mtime < time.time() - _KEPT:
      shutil.rmtree(entry.path, ignore_errors=True)


def readable(address: str) -> str:
  """A file name that tells the address to people; several addresses may have the same."""
  return re.sub(r'[^\w.-]+', '-', address)[-100:].lstrip('-.')


def _base():
  return paths.cache('buckets') or _temporary()


@functools.cache
def _temporary():
  folder = tempfile.mkdtemp(prefix='xmodal-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder
