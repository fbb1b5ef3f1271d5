"""Proof that a folder of a checkpoint is damaged: a list of its files, with sizes and checksums.

A failed read proves little: it fails when a file server restarts, and when a file was cut. So a
list of files is written with them, and damage is a difference from that list. A failure without
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
  """Writes the list of all files of a folder, once they lie on the disk.

  Reads them back, mostly from memory: about a second a gigabyte and thread.
  """
  names = _names(folder)
  for name in names:
    atomic.sync(os.path.join(folder, name))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(_size_and_checksum, (os.path.join(folder, name) for name in names))
    listed = dict(zip(names, found))
  with atomic.written(os.path.join(folder, LIST)) as f:
    json.dump(listed, f)


def proof(folder: str) -> str:
  """The first fault of the files of a sealed folder, in words; '' if there is none.

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
    return f'{LIST} is cut or overwritten'
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
  """The fault of an older checkpoint without a list: only a missing file can be proven."""
  try:
    names = os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    os.listdir(os.path.dirname(folder))  # raises if the whole disk is gone
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
