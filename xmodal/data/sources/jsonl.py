"""Bring your own data: a folder with train.jsonl, val.jsonl, test.jsonl and pictures.

One line is one example: the image and any subset of these fields:
  {"image": "a.jpg", "question": "...", "answers": ["..."], "question_id": 7,
   "question_type": "count", "caption": "..." or ["..."], "number": 3.5, "reason": "...",
   "objects": [{"box": [x, y, width, height], "name": "...", "ignore": true}],
   "expression": {"box": [x, y, width, height], "name": "the cat on the left"},
   "image_id": 12, "made": true, "made_by": ...}
image is a path relative to the folder; answers has one entry per person, text or
numbers; boxes and ignore (default: false) are as in xmodal.data.example.Object, the
expression as in Example. made (default: false) says that a model wrote the line;
made_by names the model and is not read here. null means not given. Other keys are
ignored. Files are UTF-8; a byte order mark, blank lines and CRLF are allowed.
A box without area or in shares of the picture is left out and reported, as is a
repeated question_id; any other fault in a line stops the training.
"""

from collections.abc import Iterable, Iterator
import difflib
import json
import logging
import os
import sys

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object, Packed
from xmodal.data.faults import NO_AREA, SHARES, Examples, Fault, fault, in_shares
from xmodal.data.fields import Complaint, shown
from xmodal.data.sources.files import MissingSplit, existing_folder, unreadable
from xmodal.data.sources.find_pictures import Pictures
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

SPLITS = ('train', 'val', 'test')

_EMPTY_QUESTION = 'question is empty, wanted the question that was answered'


@SOURCES.register('jsonl')
def read_jsonl(root: str, split: str) -> Examples:
  """Reads {root}/{split}.jsonl; checks that pictures exist, without opening them.

  Returns:
    Examples; their faults list everything left out of lines.

  Raises:
    UserError: no such folder or file, no examples, or a bad line (including a
      missing picture), as file:line: what, wanted.
  """
  root = existing_folder(root, 'train.jsonl, val.jsonl, test.jsonl and pictures')
  path = os.path.join(root, f'{split}.jsonl')
  parser = LineParser(root)
  examples, faults = [], []
  for number, line in numbered_lines(path):
    example, complaints = parser.parse(line, number)
    if example is None:
      raise UserError(f'{path}:{number}: {"; ".join(complaints)}; to list every bad line: '
                      f'xmodal check {root}')
    examples.append(example)
    faults += [Fault(f'{path}:{number}: {left_out}', left_out.kind) for left_out in complaints]
  if not examples:
    raise UserError(f'{path}: has no examples, wanted one JSON object a line')
  if parser.ignored:
    logging.getLogger(__name__).warning('%s: %s', path, parser.ignored_note())
  return Examples(examples, faults)


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
  """Yields (line number from 1, line) of the lines that are not blank; MissingSplit if no file."""
  if not storage.is_file(path):
    folder = os.path.dirname(path)
    found = ', '.join(sorted(f for f in storage.list_dir(folder) if f.endswith('.jsonl'))) or 'none'
    raise MissingSplit(f'{path}: no such file; .jsonl files in that folder: {found}')
  try:
    file = storage.open_file(path, 'rb')
  except OSError as error:
    raise unreadable(path, error) from None
  with file:
    for number, line in enumerate(file, 1):
      if number == 1:
        line = line.removeprefix(b'\xef\xbb\xbf')
      if line.strip():
        yield number, line


class LineParser:
  """Turns lines of JSON, or records with the same fields, into Examples.

  Attributes:
    ignored: unknown keys, in the order of their first occurrence.
  """

  def __init__(self, root: str):
    self.ignored: dict[str, None] = {}
    self._pictures = Pictures(root)
    self._left_out: list[Fault] = []  # of the line being parsed
    self._checks = {key: fields.optional(check) for key, check in {
        'image': self._image, 'image_id': fields.identifier, 'question': fields.trimmed,
        'answers': _answers, 'question_id': fields.identifier, 'question_type': fields.trimmed,
        'caption': _captions, 'objects': self._objects, 'expression': self._expression,
        'number': fields.number, 'reason': fields.trimmed, 'made': fields.flag}.items()}
    self._question_lines: dict[int | str, str] = {}  # question_id -> place
    self._image_lines: dict[int | str, tuple[str | Packed, str]] = {}  # image_id -> picture, place

  @property
  def known(self) -> tuple[str, ...]:
    """The names of the fields."""
    return tuple(self._checks)

  def parse(self, line: bytes, number: int) -> tuple[Example | None, list[str]]:
    """Parses one line.

    Returns:
      The Example, or None if the line cannot be used, and complaints, 'what, wanted
      what'. Complaints returned with an Example are Faults: things left out of it.
    """
    try:
      record = json_object(line)
    except Complaint as complaint:
      return None, [str(complaint)]
    return self.parse_record(record, f'line {number}')

  def parse_record(self, record: dict, place: str) -> tuple[Example | None, list[str]]:
    """As parse, for the object in a line.

    Args:
      record: field -> value; image may be a Packed picture, too.
      place: where it is, for complaints about a later record: 'line 7'.
    """
    self._left_out = []
    self.ignored.update((key, None) for key in record
                        if key not in self._checks and key != 'made_by')
    values, complaints = fields.check_fields(record, self._checks)
    values = {key: value for key, value in values.items() if value is not None}
    if record.get('image') is None:
      complaints.append('image is missing, wanted the path of a picture')
    no_question = record.get('question') is None or values.get('question') == ''
    if record.get('answers') not in (None, []) and no_question:
      complaints.append(_EMPTY_QUESTION)
    complaints += self._met_before(values, place)
    if complaints:
      return None, complaints + self._left_out
    values['captions'] = values.pop('caption', ())
    return Example(**values), self._left_out

  def _met_before(self, values, place):
    """Complaints about ids used by an earlier record; tolerable ones go to _left_out instead."""
    question_id, image_id, image = map(values.get, ('question_id', 'image_id', 'image'))
    if question_id is not None and (
        first := self._question_lines.setdefault(question_id, place)) != place:
      self._left_out.append(Fault(
          f'question_id {shown(question_id)} is also that of {first}, wanted a unique one',
          'question_id is that of an earlier one'))
    # Packed: each row that is about a picture holds a copy of it.
    if image_id is None or image is None or isinstance(image, Packed):
      return []
    other, first = self._image_lines.setdefault(image_id, (image, place))
    return [] if other == image else [
        f'image_id {shown(image_id)} is that of another picture in {first}, wanted a unique '
        'one: scores identify pictures by it']

  def ignored_note(self) -> str:
    """A line that names the ignored keys, or ''."""
    if not self.ignored:
      return ''
    keys = []
    for key in sorted(map(shown, self.ignored)):
      near = difflib.get_close_matches(key.strip("'"), self._checks, 1)
      keys.append(f'{key} (did you mean {near[0]!r}?)' if near else key)
    return f'ignored keys {", ".join(keys)} (known: {", ".join(self._checks)})'

  def _image(self, value):
    if isinstance(value, Packed):
      return value
    if value == '' or not isinstance(value, str):
      raise Complaint(f'is {shown(value)}, wanted the path of a picture')
    try:
      path = self._pictures.find(fields.text(value))
    except (storage.Unreachable, storage.AccessRefused):
      raise
    except UserError as error:
      raise Complaint(f'{shown(value)} cannot be accessed: {error}') from None
    if path is None:
      raise Complaint(f'{shown(value)} is not there, wanted a file in {self._pictures.root}'
                      f'{self._pictures.hint()}')
    return path

  def _objects(self, value):
    if not isinstance(value, list):
      raise Complaint(f'is {shown(value)}, wanted a list of {{"box": ..., "name": ...}}')
    things = (self._object(item, 'objects', f'{n} ') for n, item in enumerate(value, 1))
    return tuple(thing for thing in things if thing)

  def _expression(self, value):
    return self._object(value, 'expression')

  def _object(self, item, key, number=''):
    """An Object, or None if its box has no area or is in shares of the picture."""
    thing = _object(item, number)
    what = NO_AREA if min(thing.box[2:]) <= 0 else SHARES if in_shares(thing.box) else ''
    if not what:
      return thing
    self._left_out.append(fault(f'{key} {number}'.strip(), what, item['box']))
    return None


def check_questions(examples: Iterable[Example], path: str) -> None:
  """Raises UserError if an example read from path has answers but an empty question."""
  for example in examples:
    has_question = isinstance(example.question, str) and example.question.strip()
    if example.answers and not has_question:
      raise UserError(f'{path}: question_id {example.question_id!r}: {_EMPTY_QUESTION}; '
                      'take the file as distributed')


def json_object(line: bytes) -> dict:
  """The JSON object in one line of a file; Complaint if it holds none."""
  try:
    fields = json.loads(line.decode('utf-8').strip(), parse_constant=_no_constant)
  except UnicodeDecodeError as error:
    raise Complaint(f'byte {error.start + 1} is not UTF-8, wanted UTF-8 text') from None
  except json.JSONDecodeError as error:
    raise Complaint(f'not JSON ({error.msg} at column {error.colno}), '
                     'wanted one JSON object a line') from None
  except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, nesting of 1,000
    raise Complaint(f'not readable JSON ({error}), wanted one JSON object a line') from None
  if not isinstance(fields, dict):
    raise Complaint(f'is {shown(fields)}, wanted one JSON object a line')
  return fields


def _no_constant(name):
  raise Complaint(f'has the number {name}, wanted finite numbers')


def _texts(value, check):
  """A value or a list of them -> tuple of texts, none empty."""
  texts = []
  for item in value if isinstance(value, list) else [value]:
    try:
      texts.append(check(item).strip())
    except Complaint as complaint:
      raise Complaint(f'has {str(complaint).removeprefix("is ")}') from None
    if not texts[-1]:
      raise Complaint(f'has {shown(item)}, wanted text, not empty')
  return tuple(texts)


def _answers(value):
  return tuple(map(sys.intern, _texts(value, fields.answer)))


def _captions(value):
  return _texts(value, fields.text)


def _object(item, number):
  if not isinstance(item, dict) or not {'box', 'name'} <= item.keys():
    raise Complaint(f'{number}is {shown(item)}, wanted {{"box": ..., "name": ...}}')
  values, complaints = fields.check_fields(item, {
      'name': fields.name, 'box': _box, 'ignore': fields.optional(fields.flag, False)})
  if complaints:
    raise Complaint(f'{number}has {complaints[0].replace(" is ", " ", 1)}')
  return Object(**values)


def _box(value):
  try:
    x, y, width, height = value if isinstance(value, list) else ()
    return tuple(map(fields.number, (x, y, width, height)))
  except (ValueError, Complaint):
    raise Complaint(f'is {shown(value)}, wanted [x, y, width, height], numbers in pixels') from None
