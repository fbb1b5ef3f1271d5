"""Detects damage to a checkpoint folder by a list of its files with sizes and checksums.

A failed read is no proof: a restarting file server causes one, and so does a truncated file. So
each folder has a list of its files, and damage is a difference from that list. A failure without
such a difference is temporary.

Of a folder that was written to gs:// the list has the checksums that the bucket keeps (crc32c), so
that neither writing nor checking it reads the files.
"""

import base64
import concurrent.futures
import json
import os
import zlib

import google_crc32c

from xmodal import atomic, storage

LIST = 'files.json'
_BLOCK = 2**24
_ORBAX = ('_METADATA', 'manifest.ocdbt')
_CRC32C = 'crc32c:'  # before a checksum of that kind, in base64; others are of zlib


def seal(folder: str) -> None:
  """Writes the list of all files of a folder, after syncing them to disk.

  Reads them back, mostly from the page cache: about a second per gigabyte and thread.
  """
  if storage.is_remote(folder):
    listed = {name: (entry.size, _CRC32C + entry.crc32c)
              for name, entry in storage.entries(folder).items() if name != LIST}
    storage.write(os.path.join(folder, LIST), json.dumps(listed).encode())
    return
  files = names(folder)
  for name in files:
    atomic.sync(os.path.join(folder, name))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(_size_and_checksum, (os.path.join(folder, name) for name in files))
    listed = dict(zip(files, found))
  with atomic.written(os.path.join(folder, LIST)) as f:
    json.dump(listed, f)


def find_damage(folder: str) -> str:
  """Describes the first damaged file of a sealed folder; '' if there is none.

  Raises:
    OSError: the files cannot be read now, which proves nothing.
    UserError: likewise, of a bucket.
  """
  try:
    data = storage.read(os.path.join(folder, LIST))
  except (FileNotFoundError, NotADirectoryError):
    return _proof_without_list(folder)
  try:
    sizes = {name: (int(size), checksum if str(checksum).startswith(_CRC32C) else int(checksum))
             for name, (size, checksum) in json.loads(data.decode()).items()}
  except (ValueError, AttributeError, TypeError):
    return f'{LIST} is truncated or overwritten'
  entries = storage.entries(folder) if storage.is_remote(folder) else {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    faults = pool.map(lambda name: _fault(folder, name, *sizes[name], entries.get(name)), sizes)
    return next(filter(None, faults), '')


def _fault(folder, name, size, checksum, entry):
  path, with_crc32c = os.path.join(folder, name), isinstance(checksum, str)
  try:
    if with_crc32c and entry:
      found, of_content = entry.size, _CRC32C + entry.crc32c
    else:
      found, of_content = _size_and_checksum(path, with_crc32c)
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
    found = storage.list_dir(folder)
  except (FileNotFoundError, NotADirectoryError):
    os.listdir(os.path.dirname(folder))  # raises if the disk is unavailable
    return 'is missing'
  missing = [name for name in _ORBAX if name not in found]
  return f'{missing[0]} is missing' if missing else ''


def names(folder: str) -> list[str]:
  """All files below a folder of this machine, relative to it, sorted."""
  return sorted(os.path.relpath(os.path.join(place, name), folder)
                for place, _, files in os.walk(folder) for name in files)


def _size_and_checksum(path, with_crc32c=False):
  size = checksum = 0
  extend = google_crc32c.extend if with_crc32c else lambda known, block: zlib.crc32(block, known)
  for block in _blocks(path):
    size += len(block)
    checksum = extend(checksum, block)
  if with_crc32c:
    checksum = _CRC32C + base64.b64encode(checksum.to_bytes(4, 'big')).decode()
  return size, checksum


def _blocks(path):
  if storage.is_remote(path):
    place, size = 0, storage.size(path)
    while place < size:
      yield storage.read(path, place, min(_BLOCK, size - place))
      place += _BLOCK
    return
  with open(path, 'rb', buffering=0) as f:
    while block := f.read(_BLOCK):
      yield block
