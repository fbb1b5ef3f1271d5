"""WebDataset: pictures and their texts in tar files, grouped by the names of the members."""

from collections.abc import Iterable
import functools
import io
import os
import re
import tarfile
from typing import Any

from xmodal import storage
from xmodal.data.example import Packed
from xmodal.data.faults import Examples
from xmodal.data.fields import Complaint
from xmodal.data.sources import columns
from xmodal.data.sources.columns import Rows, of_cell
from xmodal.data.sources.files import existing_folder, shards, unreadable
from xmodal.data.sources.find_pictures import is_picture
from xmodal.data.sources.jsonl import json_object
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

# As the library webdataset splits names: the key ends at the first dot of the base name.
_MEMBER = re.compile(r'((?:.*/)?[^./]+)\.([^/]*)')
_META = re.compile(r'__[^/]*__($|/)')
# Extension of a member -> the field that it fills, unless config.data.fields says otherwise.
_FILLS = {'txt': 'caption', 'cls': 'answers'}
_LONGEST_TEXT = 2**24
# Of a bucket, headers are read in blocks. A request takes as long as some megabytes take to arrive,
# so that one for each header would be slower, unless members are larger.
_BLOCK = 2**22


@SOURCES.register('webdataset', options=columns.OPTIONS | columns.QUESTION)
def read_webdataset(root: str, split: str, fields: tuple = (),
                    question: str = columns.WHAT) -> Examples:
  """Reads {split}-*.tar or {split}/*.tar, in the folder or its data/.

  Members of one key are an example: 17.jpg is its picture (.png or any other that Pillow opens),
  17.txt a caption, 17.json an object with the fields of a line of jsonl, 17.cls the number or
  name of its class, an answer. With classnames.txt in the folder, a name a line, numbers become
  names. config.data.fields names other members, by their extension, or other keys of the JSON.

  One pass over the headers notes where each picture is, and reads the texts. A picture is read
  from its place when it is decoded; nothing is unpacked.

  Args:
    root, split: see xmodal.data.sources.source; val may also be named validation.
    fields, question: see xmodal.data.sources.columns.

  Returns:
    Examples in the order of the members of the files, which are sorted by name; members without
    a picture are left out and are faults.

  Raises:
    UserError: no such files, one is damaged or compressed, or an example cannot be used.
  """
  root = existing_folder(root, 'train-000000.tar or train/000000.tar')
  rows = Rows(root, fields, 'webdataset', question)
  reader = _Reader(rows, _class_names(root))
  files = shards(root, split, '.tar')
  for path, members in zip(files, storage.each(root, reader.members, files)):
    reader.add_file(path, members)
  return reader.examples(f'{root}, {split!r}')


# Key, extension, and its bytes or (offset, size).
Member = tuple[str, str, bytes | tuple[int, int]]


class _Reader:
  """Turns the members of tar files into rows."""

  def __init__(self, rows: Rows, class_names: list[str] | None):
    self._rows, self._class_names = rows, class_names
    self._texts = {'json', *_FILLS, *rows.given.values()}
    self._names: dict[str, None] = {}  # extensions and keys of JSON

  def members(self, path: str) -> Iterable[Member]:
    """The members of a file, of this machine on access.

    Raises:
      UserError: it is no tar, compressed or damaged.
    """
    found = self._members(path)
    return list(found) if storage.is_remote(path) else found

  def _members(self, path):
    try:
      with _opened(path) as file, tarfile.open(fileobj=file, mode='r:') as tar:
        while (member := tar.next()) is not None:
          tar.members = []  # it would keep all of them
          name = _MEMBER.fullmatch(member.name)
          if not name or _META.match(member.name) or not member.isfile() or member.issparse():
            continue
          ending = name[2].lower()
          place = member.offset_data, member.size
          if ending in self._texts and not is_picture(f'{name[1]}.{ending}') and (
              member.size <= _LONGEST_TEXT):
            file.seek(member.offset_data)
            place = file.read(member.size)
          yield name[1], ending, place
        # tarfile takes a damaged header for the end, which is a block of zeros.
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
          raise tarfile.ReadError(f'no header at byte {tar.offset}')
    except tarfile.TarError as error:
      raise UserError(f'{path}: damaged, compressed, or no tar ({error}); wanted a whole tar file '
                      'that is not compressed: is the download complete?') from None
    except OSError as error:
      raise unreadable(path, error) from None

  def add_file(self, path: str, members: Iterable[Member]) -> None:
    """Adds the examples of a file."""
    key, parts = None, {}
    for name, ending, place in members:
      if name != key:
        self._add(path, key, parts)
        key, parts = name, {}
      if ending in parts:
        raise UserError(f'{path}: {key}.{ending} is there twice, wanted one {ending} for a key')
      parts[ending] = place
    self._add(path, key, parts)

  def examples(self, where: str) -> Examples:
    """All examples; UserError if config.data.fields names what no example has."""
    self._rows.columns([*self._names, 'image'], where)
    return self._rows.examples(where)

  def _add(self, path, key, parts):
    """Adds one example, whose members are extension -> bytes, or (offset, size)."""
    if not parts:
      return
    where = f'{path}: {key}'
    try:
      record = self._record(path, where, parts)
    except Complaint as complaint:
      self._rows.add_bad(str(complaint), where)
      return
    if record is None:
      self._rows.leave_out(where, f'has no picture, but {", ".join(parts)}')
    else:
      self._rows.add(record, where)

  def _record(self, path, where, parts) -> dict[str, Any] | None:
    """field -> value, None if there is no picture."""
    given = self._rows.given
    pictures = [ending for ending in parts if is_picture(f'{where}.{ending}')]
    if 'image' in given:
      pictures = [given['image']] if given['image'] in parts else []
    if not pictures:
      return None
    if len(pictures) > 1:
      raise Complaint(f'has the pictures {" and ".join(pictures)}, wanted one: '
                      f"--config.data.fields=\"(('image', '{pictures[0]}'),)\"")
    found = json_object(_text('json', parts)) if 'json' in parts else {}
    self._names.update(dict.fromkeys(found))
    self._names.update((ending, None) for ending in parts
                       if ending in given.values() or ending not in ('json', *_FILLS, *pictures))
    record = {key: found[key] for key in self._rows.parser.known if key in found}
    for ending, field in _FILLS.items():
      if ending in parts and record.get(field) is None:
        record[field] = self._value(field, ending, parts)
    record |= {field: self._value(field, column, parts) if column in parts else found.get(column)
               for field, column in given.items() if field != 'image'}
    read = functools.partial(_read, path, *parts[pictures[0]])
    return record | {'image': Packed(f'{where}.{pictures[0]}', read)}

  def _value(self, field, ending, parts):
    """The value of a member that is a text."""
    try:
      text = _text(ending, parts).decode().strip()
    except UnicodeDecodeError as error:
      raise Complaint(f'{ending}: byte {error.start} is not UTF-8, wanted UTF-8 text') from None
    if ending != 'cls' or self._class_names is None or not text.isdecimal():
      return of_cell(field, text)
    if int(text) >= len(self._class_names):
      raise Complaint(f'cls is {text}, wanted a number of 0 to {len(self._class_names) - 1}, as '
                      'classnames.txt has names')
    return self._class_names[int(text)]


def _opened(path):
  if storage.is_remote(path):
    return io.BufferedReader(storage.RangeFile(path), _BLOCK)
  return open(path, 'rb')


def _text(ending, parts) -> bytes:
  if not isinstance(parts[ending], bytes):
    raise Complaint(f'{ending} is a picture, or longer than {_LONGEST_TEXT:,} bytes, wanted text')
  return parts[ending]


def _read(path: str, offset: int, size: int) -> bytes:
  """The bytes of a member. Opens the file anew: threads share no position in it."""
  try:
    found = storage.read(path, offset, size)
  except OSError as error:
    raise unreadable(path, error) from None
  if len(found) < size:
    raise UserError(f'{path}: ends at byte {offset + len(found)}, within a picture; it is shorter '
                    'than when it was opened')
  return found


def _class_names(root):
  path = os.path.join(root, 'classnames.txt')
  if not storage.is_file(path):
    return None
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      return [line.strip() for line in file if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8, wanted a name a line') from None
  except OSError as error:
    raise unreadable(path, error) from None
