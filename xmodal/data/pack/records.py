"""Files of records: TFRecord, with an index of where each record is.

A file is a sequence of records as TensorFlow's TFRecordWriter writes them: length (uint64, little
endian), masked CRC-32C of the length, data, masked CRC-32C of the data. The first record names the
pack and the number of the file, so that a file of another pack is noticed.
"""

from collections.abc import Iterable, Sequence
import os
import struct
import threading

import google_crc32c
import numpy as np

from xmodal import storage
from xmodal.errors import UserError

# Where a record's data are: number of the file, first byte, number of bytes.
PLACE = np.dtype([('file', '<u4'), ('offset', '<u8'), ('size', '<u4')])
_HEADER, _CHECKSUM, _PLACE = map(struct.Struct, ('<QI', '<I', '<IQI'))

AFTER = _CHECKSUM.size  # bytes of a file after the data of a record


def checksum(data: bytes) -> int:
  """The masked CRC-32C of TFRecord."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


class Writer:
  """Writes one file of records."""

  def __init__(self, file, number: int, title: bytes):
    """
    Args:
      file: open binary file, empty.
      number: of the file.
      title: content of the first record.
    """
    self._file, self._number, self._places, self.size = file, number, bytearray(), 0
    self.add(title)
    self._places.clear()

  def add(self, data: bytes) -> None:
    """Appends a record."""
    length = len(data).to_bytes(8, 'little')
    self._file.write(length + _CHECKSUM.pack(checksum(length)))
    self._file.write(data)
    self._file.write(_CHECKSUM.pack(checksum(data)))
    self._places += _PLACE.pack(self._number, self.size + _HEADER.size, len(data))
    self.size += _HEADER.size + len(data) + AFTER

  @property
  def places(self) -> np.ndarray:
    """Where the records are, without the first: PLACE [N]."""
    return np.frombuffer(self._places, PLACE).copy()


class RecordReader:
  """Reads records at random; threads read at the same time, and processes may get it by pickle.

  A record of a bucket is a request.
  """

  def __init__(self, paths: Sequence[str], places: np.ndarray, ahead: int = 0):
    """
    Args:
      paths: the files, by number.
      places: PLACE [N], such as a memory-mapped array.
      ahead: bytes to read of a bucket at once where a thread reads records in their order.
    """
    self._paths, self._places, self._ahead = tuple(paths), places, ahead
    self._remote = any(map(storage.is_remote, paths))
    self._files: dict[int, int] = {}
    self._lock, self._block = threading.Lock(), threading.local()

  def __len__(self):
    return len(self._places)

  def __reduce__(self):
    # A mapped index is mapped again: pickle would copy it.
    mapped = isinstance(self._places, np.memmap)
    return _reader, (self._paths, self._places.filename if mapped else self._places, self._ahead)

  def read(self, number: int) -> bytes:
    """The data of a record.

    Raises:
      UserError: the file cannot be read, or the record has changed since it was written.
    """
    file, offset, size = self._places[number].item()
    if file >= len(self._paths):
      raise UserError(f'{self._paths[0]}: its index is damaged; copy it again')
    read = self._read if not self._remote else self._read_bucket
    found = read(file, offset, size + AFTER)
    data, of_data = found[:size], found[size:]
    if len(of_data) < AFTER or _CHECKSUM.unpack(of_data)[0] != checksum(data):
      raise UserError(f'{self._paths[file]}: record {number} is damaged; make the pack again')
    return data

  def _read(self, file, offset, size):
    try:
      if file not in self._files:
        with self._lock:
          if file not in self._files:
            self._files[file] = os.open(self._paths[file], os.O_RDONLY)
      return os.pread(self._files[file], size, offset)
    except OSError as error:
      raise UserError(f'{self._paths[file]}: {error.strerror}') from error

  def _read_bucket(self, file, offset, size):
    held, start, data = getattr(self._block, 'held', (None, 0, b''))
    if held != file or not start <= offset <= start + len(data) - size:
      # After a record follow its checksum and the header of the next.
      in_order = getattr(self._block, 'next', None) == (file, offset)
      start = offset
      try:
        data = storage.read(self._paths[file], offset, max(size, self._ahead * in_order))
      except OSError as error:
        raise UserError(f'{self._paths[file]}: {error.strerror or error}') from error
      self._block.held = file, start, data if self._ahead and in_order else b''
    self._block.next = file, offset + size + _HEADER.size
    return data[offset - start:offset - start + size]

  def __del__(self):
    for descriptor in self._files.values():
      os.close(descriptor)


def _reader(paths, places, ahead):
  if not isinstance(places, np.ndarray):
    places = np.load(places, mmap_mode='r')
  return RecordReader(paths, places, ahead)


def check_files(paths: Sequence[str], sizes: Iterable[int], titles: Iterable[bytes]) -> None:
  """Raises UserError unless files of records have these sizes and first records."""
  for _ in storage.each(paths[0] if paths else '', lambda file: _check_file(*file),
                        zip(paths, sizes, titles, strict=True)):
    pass


def _check_file(path, size, title):
  try:
    found = storage.size(path)
    first = storage.read(path, _HEADER.size, len(title))
  except OSError as error:
    reason = error.strerror or 'no such file'
    raise UserError(f'{path}: {reason}; copy the pack again, all its files') from error
  if len(first) == len(title) and first != title:
    raise UserError(f'{path}: is a file of another pack; keep each pack in a folder of its own')
  if found != size:
    raise UserError(f'{path}: has {found:,} bytes of {size:,}; copy it again')
