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

from xmodal.errors import UserError

# Where a record's data are: number of the file, first byte, number of bytes.
PLACE = np.dtype([('file', '<u4'), ('offset', '<u8'), ('size', '<u4')])
_HEADER, _CHECKSUM = struct.Struct('<QI'), struct.Struct('<I')


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
    self._file, self._number, self._places, self.size = file, number, [], 0
    self.add(title)
    self._places.clear()

  def add(self, data: bytes) -> None:
    """Appends a record."""
    length = len(data).to_bytes(8, 'little')
    self._file.write(length + _CHECKSUM.pack(checksum(length)))
    self._file.write(data)
    self._file.write(_CHECKSUM.pack(checksum(data)))
    self._places.append((self._number, self.size + _HEADER.size, len(data)))
    self.size += _HEADER.size + len(data) + _CHECKSUM.size

  @property
  def places(self) -> np.ndarray:
    """Where the records are, without the first: PLACE [N]."""
    return np.array(self._places, PLACE)


class Reader:
  """Reads records at random; threads read at the same time, and processes may get it by pickle."""

  def __init__(self, paths: Sequence[str], places: np.ndarray):
    """
    Args:
      paths: the files, by number.
      places: PLACE [N], such as a memory-mapped array.
    """
    self._paths, self._places = tuple(paths), places
    self._files: dict[int, int] = {}
    self._lock = threading.Lock()

  def __len__(self):
    return len(self._places)

  def __reduce__(self):
    return Reader, (self._paths, self._places)

  def read(self, number: int) -> bytes:
    """The data of a record.

    Raises:
      UserError: the file cannot be read, or the record has changed since it was written.
    """
    file, offset, size = self._places[number].item()
    found = self._read(file, offset, size + _CHECKSUM.size)
    data, of_data = found[:size], found[size:]
    if len(of_data) < _CHECKSUM.size or _CHECKSUM.unpack(of_data)[0] != checksum(data):
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

  def __del__(self):
    for descriptor in self._files.values():
      os.close(descriptor)


def check_files(paths: Sequence[str], sizes: Iterable[int], titles: Iterable[bytes]) -> None:
  """Raises UserError unless files of records have these sizes and first records."""
  for path, size, title in zip(paths, sizes, titles, strict=True):
    try:
      found = os.path.getsize(path)
      with open(path, 'rb') as f:
        first = f.read(_HEADER.size + len(title))[_HEADER.size:]
    except OSError as error:
      raise UserError(f'{path}: {error.strerror}; copy the pack again, all its files') from error
    if found != size:
      raise UserError(f'{path}: has {found:,} bytes of {size:,}; copy it again')
    if first != title:
      raise UserError(f'{path}: is a file of another pack; keep each pack in a folder of its own')
