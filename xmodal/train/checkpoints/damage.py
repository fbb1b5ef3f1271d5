"""Detects damage to a checkpoint folder by a list of its files with sizes and checksums.

A failed read is no proof: a restarting file server causes one, and so does a truncated file. So
each folder has a list of its files, and damage is a difference from that list. A failure without
such a difference is temporary.
"""

import concurrent.futures
import json
import os
import zlib

from xmodal import atomic

LIST = 'files.json'
_BLOCK = 2**24
_ORBAX = ('_METADATA', 'manifest.ocdbt')


def seal(folder: str) -> None:
  """Writes the list of all files of a folder, after syncing them to disk.

  Reads them back, mostly from the page cache: about a second per gigabyte and thread.
  """
  names = _names(folder)
  for name in names:
    atomic.sync(os.path.join(folder, name))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(_size_and_checksum, (os.path.join(folder, name) for name in names))
    listed = dict(zip(names, found))
  with atomic.written(os.path.join(folder, LIST)) as f:
    json.dump(listed, f)


def find_damage(folder: str) -> str:
  """Describes the first damaged file of a sealed folder; '' if there is none.

  Raises:
    OSError: the files cannot be read now, which proves nothing.
  """
  try:
    with open(os.path.join(folder, LIST), encoding='utf-8') as f:
      listed = json.load(f)
    sizes = {name: (int(size), int(checksum)) for name, (size, checksum) in listed.items()}
  except (FileNotFoundError, NotADirectoryError):
    return _proof_without_list(folder)
  except (ValueError, AttributeError, TypeError):
    return f'{LIST} is truncated or overwritten'
  with concurrent.futures.ThreadPoolExecutor() as pool:
    faults = pool.map(lambda name: _fault(folder, name, *sizes[name]), sizes)
    return next(filter(None, faults), '')


def _fault(folder, name, size, checksum):
  try:
    found, of_content = _size_and_checksum(os.path.join(folder, name))
  except (FileNotFoundError, NotADirectoryError):
    return f'{name} is missing'
  except IsADirectoryError:
    return f'{name} is a folder'
  if found != size:
    return f'{name} has {found:,} bytes of {size:,}'
  return '' if of_content == checksum else f'{name} has changed since it was written'


def _proof_without_list(folder):
  """Describes damage to an older checkpoint without a list: only missing files can be proven."""
  try:
    names = os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    os.listdir(os.path.dirname(folder))  # raises if the disk is unavailable
    return 'is missing'
  missing = [name for name in _ORBAX if name not in names]
  return f'{missing[0]} is missing' if missing else ''


def _names(folder):
  return sorted(os.path.relpath(os.path.join(place, name), folder)
                for place, _, names in os.walk(folder) for name in names)


def _size_and_checksum(path):
  size = checksum = 0
  with open(path, 'rb', buffering=0) as f:
    while block := f.read(_BLOCK):
      size += len(block)
      checksum = zlib.crc32(block, checksum)
  return size, checksum
