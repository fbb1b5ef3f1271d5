"""Bring your own data: a folder with train.jsonl, val.jsonl, test.jsonl and pictures.

One line is one example, any subset of these fields beside the image:
  {"image": "a.jpg", "question": "...", "answers": ["..."], "question_id": 7,
   "question_type": "count", "caption": "..." or ["..."], "number": 3.5, "reason": "...",
   "objects": [{"box": [x, y, width, height], "name": "..."}]}
image is a path from the folder; answers is one entry a person, text or numbers;
boxes are as in xmodal.data.example.Object. null means not given. Other keys are
ignored. Files are UTF-8; a byte order mark, blank lines and CRLF are allowed.
"""

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator

from xmodal.data.example import Example, Object
from xmodal.errors import UserError

SPLITS = ('train', 'val', 'test')

_UNASKED = 'question is empty, wanted the question that was answered'
# These say that a path names nothing; other errors, that it cannot be looked up.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def read_jsonl(root: str, split: str) -> list[Example]:
  """Reads {root}/{split}.jsonl; pictures are looked up, not opened.

  Raises:
    UserError: no such folder, file or examples, or a bad line (a picture that is
      not there included), as file:line: what, wanted.
  """
  root = existing_folder(root, 'train.jsonl, val.jsonl, test.jsonl and pictures')
  path = os.path.join(root, f'{split}.jsonl')
  parser = LineParser(root)
  examples = []
  for number, line in numbered_lines(path):
    example = parser.parse(line)
    if not isinstance(example, Example):
      raise UserError(f'{path}:{number}: {"; ".join(example)}; to list every bad line: '
                      f'python -m xmodal.data.check {root}')
    examples.append(example)
  if not examples:
    raise UserError(f'{path}: has no examples, wanted one JSON object a line')
  if parser.ignored:
    logging.getLogger(__name__).warning('%s: %s', path, parser.ignored_note())
  return examples


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
  """Yields (line number from 1, line) of the lines that are not blank; UserError if no file."""
  if not os.path.isfile(path):
    folder = os.path.dirname(path)
    found = ', '.join(sorted(f for f in os.listdir(folder) if f.endswith('.jsonl'))) or 'none'
    raise UserError(f'{path}: no such file; .jsonl files in that folder: {found}')
  try:
    file = open(path, 'rb')
  except OSError as error:
    raise _unreadable(path, error) from None
  with file:
    for number, line in enumerate(file, 1):
      if number == 1:
        line = line.removeprefix(b'\xef\xbb\xbf')
      if line.strip():
        yield number, line


class LineParser:
  """Parses the lines of one folder's files.

  Attributes:
    ignored: the keys met that have no meaning here, in the order met.
  """

  def __init__(self, root: str):
    self.ignored: dict[str, None] = {}
    self._pictures = Pictures(root)
    self._readers = {
        'image': self._image, 'question': _text, 'answers': _answers,
        'question_id': _question_id, 'question_type': _text, 'caption': _captions,
        'objects': _objects, 'number': _number, 'reason': _text}

  def parse(self, line: bytes) -> Example | list[str]:
    """One line -> an Example, or all that is wrong with it, each as 'what, wanted what'."""
    try:
      fields = _json_object(line)
    except _Complaint as complaint:
      return [str(complaint)]
    self.ignored.update((key, None) for key in fields if key not in self._readers)
    values, complaints = {}, []
    for key, read in self._readers.items():
      if fields.get(key) is not None:
        try:
          values[key] = read(fields[key])
        except _Complaint as complaint:
          complaints.append(f'{key} {complaint}')
    if fields.get('image') is None:
      complaints.append('image is missing, wanted the path of a picture')
    unasked = fields.get('question') is None or values.get('question') == ''
    if fields.get('answers') not in (None, []) and unasked:
      complaints.append(_UNASKED)
    if complaints:
      return complaints
    values['captions'] = values.pop('caption', ())
    return Example(**values)

  def ignored_note(self) -> str:
    """Says which keys were ignored, or ''."""
    if not self.ignored:
      return ''
    return (f'ignored keys {", ".join(sorted(map(_shown, self.ignored)))} '
            f'(known: {", ".join(self._readers)})')

  def _image(self, value):
    if not isinstance(value, str) or not value:
      raise _Complaint(f'is {_shown(value)}, wanted the path of a picture')
    try:
      path = self._pictures.find(value)
    except UserError as error:
      raise _Complaint(f'{_shown(value)} is out of reach: {error}') from None
    if path is None:
      raise _Complaint(f'{_shown(value)} is not there, wanted a file in {self._pictures.root}')
    return path


def check_asked(examples: Iterable[Example], path: str) -> None:
  """Raises UserError if an example read from path has answers but an empty question."""
  for example in examples:
    asked = isinstance(example.question, str) and example.question.strip()
    if example.answers and not asked:
      raise UserError(f'{path}: question_id {example.question_id!r}: {_UNASKED}; '
                      'take the file as distributed')


class Pictures:
  """Knows which files exist below a folder, listing each folder once."""

  def __init__(self, root: str):
    self.root = root
    self._names: dict[str, frozenset[str]] = {}

  def find(self, name: str) -> str | None:
    """The absolute path of a file named from the root, None where there is none.

    Raises:
      UserError: the folder of the file may not be listed.
    """
    path = os.path.join(self.root, name)
    folder, base = os.path.split(path)
    if folder not in self._names:
      self._names[folder] = _file_names(folder)
    return path if base in self._names[folder] else None


def existing_folder(root: str, wanted: str) -> str:
  """The absolute path of a data folder; UserError if there is none or it is empty."""
  path = os.path.abspath(os.path.expanduser(root))
  if not root or not os.path.isdir(path):
    found = 'is a file' if os.path.isfile(path) else 'is not there'
    raise UserError(f'data folder {root!r} {found}, wanted a folder with {wanted}; '
                    'set config.data.root')
  try:
    filled = os.listdir(path)
  except OSError as error:
    raise _unreadable(path, error) from None
  if not filled:
    raise UserError(f'data folder {path} is empty, wanted {wanted}; set config.data.root')
  return path


def read_records(path: str, names: tuple[str, ...], key: str = '') -> list[tuple]:
  """The named fields of each record of a JSON list (of the list under key, if given).

  Raises:
    UserError: no such file, broken JSON (with its place), no such list, nothing
      in it, or a record that lacks a field.
  """
  try:
    with open(path, encoding='utf-8-sig') as file:
      records = json.load(file)
  except FileNotFoundError:
    raise UserError(f'{path}: no such file, wanted it as distributed') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}, '
                    f'character {error.pos}); is the download complete?') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8; is it the right file?') from None
  except OSError as error:
    raise _unreadable(path, error) from None
  where = f'a list under {key!r}' if key else 'a list'
  if key:
    records = records.get(key) if isinstance(records, dict) else None
  if not isinstance(records, list) or not records:
    raise UserError(f'{path}: wanted {where} with at least one record, found {_shown(records)}')
  try:
    return [tuple(record[name] for name in names) for record in records]
  except (KeyError, TypeError):
    number = next(i for i, record in enumerate(records)
                  if not isinstance(record, dict) or not record.keys() >= set(names))
    raise UserError(f'{path}: record {number} (from 0) is {_shown(records[number])}, '
                    f'wanted the fields {", ".join(names)}') from None


def check_present(missing: list[str], total: int, folder: str) -> None:
  """Raises UserError if any of the pictures that a data set names is missing."""
  if missing:
    raise UserError(f'{len(missing)} of {total} pictures are not in {folder}, such as '
                    f'{missing[0]}; unpack the pictures there')


def _file_names(folder):
  try:
    with os.scandir(folder) as entries:
      return frozenset(entry.name for entry in entries if _is_file(entry))
  except ValueError:  # a NUL in the name
    return frozenset()
  except OSError as error:
    if error.errno in _NOTHING_THERE:
      return frozenset()
    raise _unreadable(folder, error) from None


def _is_file(entry):
  try:
    return entry.is_file()
  except OSError:  # a link to itself, or into a folder that may not be read
    return False


def _unreadable(path, error):
  return UserError(f'{path}: cannot be read ({error.strerror}); let this user read it')


class _Complaint(Exception):
  """What is wrong with one value: 'what it is, wanted what'."""


def _json_object(line):
  try:
    fields = json.loads(line.decode('utf-8').strip(), parse_constant=_no_constant)
  except UnicodeDecodeError as error:
    raise _Complaint(f'byte {error.start + 1} is not UTF-8, wanted UTF-8 text') from None
  except json.JSONDecodeError as error:
    raise _Complaint(f'not JSON ({error.msg} at column {error.colno}), '
                     'wanted one JSON object a line') from None
  except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, depth of 1,000
    raise _Complaint(f'not readable JSON ({error}), wanted one JSON object a line') from None
  if not isinstance(fields, dict):
    raise _Complaint(f'is {_shown(fields)}, wanted one JSON object a line')
  return fields


def _no_constant(name):
  raise _Complaint(f'has the number {name}, wanted finite numbers')


def _text(value):
  if not isinstance(value, str):
    raise _Complaint(f'is {_shown(value)}, wanted text')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    raise _Complaint(f'is {_shown(value)}, wanted text without half characters '
                     '(\\ud800 to \\udfff alone)') from None
  return value.strip()


def _filled_texts(value, kinds, wanted):
  """A value or a list of them -> tuple of texts, none empty."""
  texts = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, bool) or not isinstance(item, kinds):
      raise _Complaint(f'has {_shown(item)}, wanted {wanted}')
    text = _text(item if isinstance(item, str) else _number_text(item))
    if not text:
      raise _Complaint(f'has {_shown(item)}, wanted {wanted}, not empty')
    # Answers repeat: one copy of each keeps large sets small in memory.
    texts.append(sys.intern(text))
  return tuple(texts)


def _answers(value):
  return _filled_texts(value, (str, int, float), 'text or a number, or a list of them')


def _captions(value):
  return _filled_texts(value, str, 'text or a list of texts')


def _number_text(number):
  """The number as people write it: 2.0 as '2'."""
  return str(int(number)) if _number(number).is_integer() else repr(number)


def _number(value):
  try:
    if not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  except (TypeError, OverflowError):
    pass
  raise _Complaint(f'is {_shown(value)}, wanted a finite number')


def _question_id(value):
  if isinstance(value, bool) or not isinstance(value, (int, str)):
    raise _Complaint(f'is {_shown(value)}, wanted a whole number or text')
  return value


def _objects(value):
  if not isinstance(value, list):
    raise _Complaint(f'is {_shown(value)}, wanted a list of {{"box": ..., "name": ...}}')
  return tuple(_object(item, number) for number, item in enumerate(value, 1))


def _object(item, number):
  if not isinstance(item, dict) or not {'box', 'name'} <= item.keys():
    raise _Complaint(f'{number} is {_shown(item)}, wanted {{"box": ..., "name": ...}}')
  name, box = item['name'], item['box']
  if not isinstance(name, str) or not name.strip():
    raise _Complaint(f'{number} has name {_shown(name)}, wanted text, not empty')
  try:
    x, y, width, height = box if isinstance(box, list) else ()
    box = _number(x), _number(y), _number(width), _number(height)
  except (ValueError, _Complaint):
    raise _Complaint(f'{number} has box {_shown(box)}, '
                     'wanted [x, y, width, height], numbers in pixels') from None
  if min(box[2:]) <= 0:
    raise _Complaint(f'{number} has box {_shown(list(box))} without area, '
                     'wanted [x, y, width, height] with both sides above 0')
  return Object(sys.intern(_text(name)), box)


def _shown(value):
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
