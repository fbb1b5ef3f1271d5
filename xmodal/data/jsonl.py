"""Bring your own data: a folder with train.jsonl, val.jsonl, test.jsonl and pictures.

One line is one example, any subset of these fields beside the image:
  {"image": "a.jpg", "question": "...", "answers": ["..."], "question_id": 7,
   "question_type": "count", "caption": "..." or ["..."], "number": 3.5, "reason": "...",
   "objects": [{"box": [x, y, width, height], "name": "...", "ignore": true}],
   "expression": {"box": [x, y, width, height], "name": "the cat on the left"},
   "image_id": 12, "made": true, "made_by": ...}
image is a path from the folder; answers is one entry a person, text or numbers;
boxes and ignore (false, if not given) are as in xmodal.data.example.Object, the
expression as in Example. made (false, if not given) says that a model wrote the
line, and made_by which: nothing here reads it. null means not given. Other keys
are ignored. Files are UTF-8; a byte order mark, blank lines and CRLF are allowed.
A box without area is left out and told of; whatever else is wrong in a line stops
the training.
"""

import difflib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator

from xmodal.data.example import Example, Object
from xmodal.data.faults import NO_AREA, Examples, Fault, fault
from xmodal.data.files import MissingSplit, Pictures, existing_folder, shown, unreadable
from xmodal.errors import UserError

SPLITS = ('train', 'val', 'test')

_UNASKED = 'question is empty, wanted the question that was answered'


def read_jsonl(root: str, split: str) -> Examples:
  """Reads {root}/{split}.jsonl; pictures are looked up, not opened.

  Boxes without area are its faults.

  Raises:
    UserError: no such folder, file or examples, or a bad line (a picture that is
      not there included), as file:line: what, wanted.
  """
  root = existing_folder(root, 'train.jsonl, val.jsonl, test.jsonl and pictures')
  path = os.path.join(root, f'{split}.jsonl')
  parser = LineParser(root)
  examples, faults = [], []
  for number, line in numbered_lines(path):
    example, complaints = parser.parse(line)
    if example is None:
      raise UserError(f'{path}:{number}: {"; ".join(complaints)}; to list every bad line: '
                      f'python -m xmodal.data.check {root}')
    examples.append(example)
    faults += [Fault(f'{path}:{number}: {left_out}', left_out.kind) for left_out in complaints]
  if not examples:
    raise UserError(f'{path}: has no examples, wanted one JSON object a line')
  if parser.ignored:
    logging.getLogger(__name__).warning('%s: %s', path, parser.ignored_note())
  return Examples(examples, faults)


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
  """Yields (line number from 1, line) of the lines that are not blank; MissingSplit if no file."""
  if not os.path.isfile(path):
    folder = os.path.dirname(path)
    found = ', '.join(sorted(f for f in os.listdir(folder) if f.endswith('.jsonl'))) or 'none'
    raise MissingSplit(f'{path}: no such file; .jsonl files in that folder: {found}')
  try:
    file = open(path, 'rb')
  except OSError as error:
    raise unreadable(path, error) from None
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
    self._left_out: list[Fault] = []  # of the line being parsed
    self._readers = {
        'image': self._image, 'image_id': _id, 'question': _text, 'answers': _answers,
        'question_id': _id, 'question_type': _text, 'caption': _captions,
        'objects': self._objects, 'expression': self._expression, 'number': _number,
        'reason': _text, 'made': _made}

  def parse(self, line: bytes) -> tuple[Example | None, list[str]]:
    """One line -> an Example, None where it cannot be used, and all that is wrong with the line.

    Each complaint is 'what, wanted what'; those beside an Example are Faults, of
    what was left out of it.
    """
    self._left_out = []
    try:
      fields = _json_object(line)
    except _Complaint as complaint:
      return None, [str(complaint)]
    self.ignored.update((key, None) for key in fields
                        if key not in self._readers and key != 'made_by')
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
      return None, complaints + self._left_out
    values['captions'] = values.pop('caption', ())
    return Example(**values), self._left_out

  def ignored_note(self) -> str:
    """Says which keys were ignored, or ''."""
    if not self.ignored:
      return ''
    keys = []
    for key in sorted(map(shown, self.ignored)):
      near = difflib.get_close_matches(key.strip("'"), self._readers, 1)
      keys.append(f'{key} (did you mean {near[0]!r}?)' if near else key)
    return f'ignored keys {", ".join(keys)} (known: {", ".join(self._readers)})'

  def _image(self, value):
    if not isinstance(value, str) or not value:
      raise _Complaint(f'is {shown(value)}, wanted the path of a picture')
    try:
      path = self._pictures.find(value)
    except UserError as error:
      raise _Complaint(f'{shown(value)} is out of reach: {error}') from None
    if path is None:
      raise _Complaint(f'{shown(value)} is not there, wanted a file in {self._pictures.root}')
    return path

  def _objects(self, value):
    if not isinstance(value, list):
      raise _Complaint(f'is {shown(value)}, wanted a list of {{"box": ..., "name": ...}}')
    things = (self._object(item, 'objects', f'{n} ') for n, item in enumerate(value, 1))
    return tuple(thing for thing in things if thing)

  def _expression(self, value):
    return self._object(value, 'expression')

  def _object(self, item, key, number=''):
    """An Object, or None where its box has no area."""
    thing = _object(item, number)
    if min(thing.box[2:]) > 0:
      return thing
    self._left_out.append(fault(f'{key} {number}'.strip(), NO_AREA, item['box']))
    return None


def check_asked(examples: Iterable[Example], path: str) -> None:
  """Raises UserError if an example read from path has answers but an empty question."""
  for example in examples:
    asked = isinstance(example.question, str) and example.question.strip()
    if example.answers and not asked:
      raise UserError(f'{path}: question_id {example.question_id!r}: {_UNASKED}; '
                      'take the file as distributed')


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
    raise _Complaint(f'is {shown(fields)}, wanted one JSON object a line')
  return fields


def _no_constant(name):
  raise _Complaint(f'has the number {name}, wanted finite numbers')


def _text(value):
  if not isinstance(value, str):
    raise _Complaint(f'is {shown(value)}, wanted text')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    raise _Complaint(f'is {shown(value)}, wanted text without half characters '
                     '(\\ud800 to \\udfff alone)') from None
  return value.strip()


def _filled_texts(value, kinds, wanted):
  """A value or a list of them -> tuple of texts, none empty."""
  texts = []
  for item in value if isinstance(value, list) else [value]:
    if isinstance(item, bool) or not isinstance(item, kinds):
      raise _Complaint(f'has {shown(item)}, wanted {wanted}')
    text = _text(item if isinstance(item, str) else _number_text(item))
    if not text:
      raise _Complaint(f'has {shown(item)}, wanted {wanted}, not empty')
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
  raise _Complaint(f'is {shown(value)}, wanted a finite number')


def _made(value):
  if not isinstance(value, bool):
    raise _Complaint(f'is {shown(value)}, wanted true or false')
  return value


def _id(value):
  if isinstance(value, bool) or not isinstance(value, (int, str)):
    raise _Complaint(f'is {shown(value)}, wanted a whole number or text')
  return value


def _object(item, number):
  if not isinstance(item, dict) or not {'box', 'name'} <= item.keys():
    raise _Complaint(f'{number}is {shown(item)}, wanted {{"box": ..., "name": ...}}')
  name, box, ignore = item['name'], item['box'], item.get('ignore')
  if not isinstance(name, str) or not name.strip():
    raise _Complaint(f'{number}has name {shown(name)}, wanted text, not empty')
  try:
    x, y, width, height = box if isinstance(box, list) else ()
    box = _number(x), _number(y), _number(width), _number(height)
  except (ValueError, _Complaint):
    raise _Complaint(f'{number}has box {shown(box)}, '
                     'wanted [x, y, width, height], numbers in pixels') from None
  if ignore not in (None, False, True):
    raise _Complaint(f'{number}has ignore {shown(ignore)}, wanted true or false')
  return Object(sys.intern(_text(name)), box, bool(ignore))
