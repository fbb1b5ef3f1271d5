"""Maps the columns of a data set, whichever library reads it, to the fields of an Example.

config.data.fields names the column of each field: {'image': 'photo', 'box': 'objects/bbox'}. A
column inside another is written with a slash. Fields and what their columns hold in one record:

  image: a picture.
  image_id, question_id: a number or text.
  question: text; a list of texts gives one Example each.
  answers: text, a name of a class or a number, or a list of them; one of these for each question
    if there are several. Without a column of questions, all have the question config.data.question.
  question_type, reason: text. number: a number. caption: text or a list of texts.
  box, name, ignore: lists, one entry per object.
  expression: a list of texts for each box, or one text; gives one Example for each text.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

from xmodal.data.example import Example, Object
from xmodal.data.faults import in_shares
from xmodal.data.pictures import images
from xmodal.data.sources.files import MissingSplit
from xmodal.errors import UserError, did_you_mean
from xmodal.options import Option

OPTIONS = {
    'name': Option('', 'Name of the data set in its library, such as coco/2017 or owner/name.',
                   may_change=True),
    'fields': Option({}, "Column of each field, such as {'image': 'photo', 'box': 'objects/bbox'}; "
                     'fields not given are found by themselves.'),
    'question': Option('what is it?', 'Question of examples that have answers and none.')}

PICTURE, TEXT, CLASS = 'a picture', 'text', 'a class'
NUMBER, FLAG, BOX = 'a number', 'a flag', 'a box'
_DEPTHS = ('once a record', 'in a list', 'in a list of lists')
_WORDS = (TEXT, CLASS)
# Field -> kinds of value that its column may hold, and in how many lists they may lie.
_WANTED = {
    'image': ((PICTURE,), (0,)), 'image_id': ((NUMBER, TEXT), (0,)), 'question': ((TEXT,), (0, 1)),
    'question_id': ((NUMBER, TEXT), (0, 1)), 'question_type': (_WORDS, (0, 1)),
    'answers': ((*_WORDS, NUMBER), (0, 1, 2)), 'caption': ((TEXT,), (0, 1)),
    'number': ((NUMBER,), (0, 1)), 'reason': ((TEXT,), (0, 1)), 'box': ((BOX,), (1,)),
    'name': ((*_WORDS, NUMBER), (1,)), 'ignore': ((FLAG, NUMBER), (1,)),
    'expression': ((TEXT,), (1, 2))}
_OF_OBJECTS = ('box', 'name', 'ignore')
# Field -> names that its column often has.
_COMMON = {
    'image': ('image', 'img', 'picture', 'photo', 'jpg', 'png'),
    'image_id': ('image_id', 'image/id', 'image/filename'), 'question': ('question',),
    'question_id': ('question_id',), 'question_type': ('question_type', 'answer_type'),
    'answers': ('answers', 'answer', 'answers/answer', 'label', 'labels', 'fine_label'),
    'caption': ('captions', 'caption', 'captions/text', 'text', 'sentences'),
    'number': ('number',), 'reason': ('reason',),
    'box': tuple(f'objects/{key}' for key in ('bbox', 'box')),
    'name': tuple(f'objects/{key}' for key in ('label', 'category', 'name')),
    'ignore': tuple(f'objects/{key}' for key in ('is_crowd', 'iscrowd', 'ignore', 'difficult'))}
# Fields with one value for each question, where a record has several.
_OF_A_QUESTION = ('question', 'question_id', 'question_type', 'answers', 'number', 'reason')


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of a data set.

  Attributes:
    path: its name, such as 'objects/bbox'.
    kind: what it holds: PICTURE, ..., BOX; '' if none of them.
    depth: the number of lists around each value: 0 for one value a record.
    type: its type as the library writes it, for messages.
    read: record -> value: bytes or path of a picture, text, name of a class, number, bool, four
      numbers of a box; in `depth` lists. None where it is missing.
  """

  path: str
  kind: str
  depth: int
  type: str
  read: Callable[[Any], Any]


def match_columns(paths: Mapping[str, str], columns: Mapping[str, Column], where: str
                  ) -> dict[str, Column]:
  """The column of each field.

  Args:
    paths: field -> path of its column.
    columns: all columns by path.
    where: the data set, for messages.

  Raises:
    UserError: there is no such field or column, a column holds something else, or none has
      pictures.
  """
  matched = {}
  for field, path in paths.items():
    if field not in _WANTED:
      raise UserError(f'config.data.fields: no field {field!r}{did_you_mean(field, _WANTED)}; '
                      f'wanted some of {", ".join(_WANTED)}')
    if path not in columns:
      raise UserError(f'{where}: no column {path!r} for {field!r}'
                      f'{did_you_mean(str(path), columns)}; columns: {", ".join(columns)}; set '
                      'config.data.fields')
    column, (kinds, depths) = columns[path], _WANTED[field]
    if column.kind not in kinds or column.depth not in depths:
      lists = ' or '.join(_DEPTHS[depth] for depth in depths)
      raise UserError(f'{where}: column {path!r}, {_type(column)}, cannot be {field!r}, wanted '
                      f'{" or ".join(kinds)}, {lists}; set config.data.fields')
    matched[field] = column
  if 'image' not in matched:
    found = ', '.join(f'{path} ({_type(column)})' for path, column in columns.items())
    raise UserError(f'{where}: no column of pictures found among {found}; set '
                    "config.data.fields={'image': ...}")
  _check_together(matched, where)
  return matched


def find_columns(columns: Mapping[str, Column]) -> dict[str, str]:
  """Field -> path of its column, for columns with common names."""
  found = {}
  for field, names in _COMMON.items():
    kinds, depths = _WANTED[field]
    found |= next(({field: path} for path in names if (column := columns.get(path))
                   and column.kind in kinds and column.depth in depths), {})
  if 'name' not in found or 'box' not in found:
    found = {field: path for field, path in found.items() if field not in _OF_OBJECTS}
  return found


def _check_together(matched, where):
  if 'box' in matched and not {'name', 'expression'} & matched.keys():
    raise UserError(f'{where}: column {matched["box"].path!r} has boxes, and no column their '
                    "names; set config.data.fields={'name': ...}")
  if lonely := [field for field in ('name', 'ignore', 'expression')
                if field in matched and 'box' not in matched]:
    raise UserError(f'{where}: column {matched[lonely[0]].path!r} is {lonely[0]!r}, which needs '
                    "boxes; set config.data.fields={'box': ...}")
  several = 'question' in matched and matched['question'].depth == 1
  if several and 'expression' in matched:
    raise UserError(f'{where}: several questions and several expressions in one record cannot be '
                    'read together; leave one out of config.data.fields')
  for field in filter(matched.get, _OF_A_QUESTION):
    if matched[field].depth not in (several, several + (field == 'answers')):
      raise UserError(
          f'{where}: column {matched[field].path!r}, {_type(matched[field])}, cannot be '
          f'{field!r}, wanted {"one entry for each question" if several else "one for a record"}; '
          'set config.data.fields')


def _type(column):
  return f'{column.type} {_DEPTHS[column.depth]}' if column.depth < 3 else f'{column.type} in lists'


def boxes_in_shares(box: Sequence[float], height: float, width: float) -> tuple[float, ...]:
  """A box (ymin, xmin, ymax, xmax) in 0..1 -> (x, y, width, height) in pixels, to 0.001 pixel.

  Rounding undoes float32, in which an edge may lie a little outside its picture.
  """
  ymin, xmin, ymax, xmax = box
  return _rounded(xmin * width, ymin * height, (xmax - xmin) * width, (ymax - ymin) * height)


def corners(box: Sequence[float], height: float, width: float) -> tuple[float, ...]:
  """A box (xmin, ymin, xmax, ymax) in pixels -> (x, y, width, height)."""
  xmin, ymin, xmax, ymax = box
  return _rounded(xmin, ymin, xmax - xmin, ymax - ymin)


def sides(box: Sequence[float], height: float, width: float) -> tuple[float, ...]:
  """A box (x, y, width, height) in pixels, to 0.001 pixel."""
  return _rounded(*box)


def _rounded(*edges):
  return tuple(round(float(edge), 3) for edge in edges)


class Records:
  """A split as a sequence of Examples, made from records on access; any thread may read.

  Args:
    records: the records, which several threads may read at once.
    columns: the column of each field.
    question: of Examples with answers and no column of questions.
    to_pixels: box of a column, height and width of its picture -> (x, y, width, height) in pixels.
    where: the split, for messages.
    counted: reads only the columns that decide how many Examples a record gives; None: as records.
      If a record may give several, all are counted at once, which reads the whole split.

  Raises:
    MissingSplit: there are no Examples.
  """

  def __init__(self, records: Sequence, columns: Mapping[str, Column], question: str,
               to_pixels: Callable[[Sequence[float], float, float], tuple[float, ...]], where: str,
               counted: Sequence | None = None):
    self._records, self._columns, self._where = records, dict(columns), where
    self._question, self._to_pixels = question, to_pixels
    self._splits = next((column for field in ('expression', 'question')
                         if (column := columns.get(field)) and column.depth > 0), None)
    self._ends = None
    if self._splits:
      counted = records if counted is None else counted
      counts = (len(self._parts(counted[i])) for i in range(len(records)))
      self._ends = list(itertools.accumulate(counts))
    if not len(self):
      raise MissingSplit(f'{where}: has no examples; take another split')

  def __len__(self) -> int:
    if self._ends is None:
      return len(self._records)
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(index)
    if self._ends is None:
      return self._example(index, self._records[index], None)
    number = bisect.bisect(self._ends, index)
    record = self._records[number]
    place = index - (self._ends[number - 1] if number else 0)
    return self._example(number, record, self._parts(record)[place])

  def _parts(self, record):
    """What each Example of a record is about: (number of the question or box, expression)."""
    found = self._splits.read(record)
    if found is None:
      return []
    if self._splits is not self._columns.get('expression'):
      return [(place, None) for place in range(len(found))]
    return [(place, text) for place, texts in enumerate(found)
            for text in (texts if self._splits.depth == 2 else [texts]) if text and text.strip()]

  def _example(self, number, record, part):
    values = {field: column.read(record) for field, column in self._columns.items()}
    if part is not None and part[1] is None:  # one of several questions
      values |= {field: values[field][part[0]] for field in _OF_A_QUESTION if field in values}
    image = values['image'] or b''  # missing: counts as unreadable
    answers = tuple(map(_word, filter(_is_given, _listed(values.get('answers')))))
    question = values.get('question') or ''
    if (answers or values.get('number') is not None) and 'question' not in values:
      question = self._question
    objects, expression = None, None
    if 'box' in values:
      objects, expression = self._objects(number, image, values, part)
    return Example(
        image=image, image_id=values.get('image_id'), question=question.strip(), answers=answers,
        question_id=values.get('question_id'), question_type=values.get('question_type') or '',
        captions=tuple(text.strip() for text in filter(_is_given, _listed(values.get('caption')))),
        objects=objects, expression=expression, number=_number(values.get('number')),
        reason=(values.get('reason') or '').strip())

  def _objects(self, number, image, values, part):
    """The objects of a record (None if it has no names of them), and the expression of a part."""
    boxes = values['box'] or ()
    try:
      size = images.header_size(image) if isinstance(image, bytes) else images.decode(
          image, (8, 8)).size
    except UserError:  # unreadable: decoding it will say so
      return None, None
    pixels = [self._checked(number, box, size) for box in boxes]
    objects = None
    if 'name' in values:
      ignored = values.get('ignore') or [False] * len(boxes)
      objects = tuple(Object(' '.join(_word(name).split()), box, bool(ignore))
                      for name, box, ignore in zip(values['name'] or (), pixels, ignored)
                      if name is not None and _word(name).strip())
    if part is None or part[1] is None:
      return objects, None
    return objects, Object(' '.join(part[1].split()), pixels[part[0]])

  def _checked(self, number, box, size):
    if len(box) != 4 or None in box or not all(map(math.isfinite, box)):
      raise UserError(f'{self._where}: record {number} has box {list(box)}, wanted four finite '
                      'numbers')
    found = self._to_pixels(box, *size)
    if self._to_pixels is not boxes_in_shares and in_shares(found):
      raise UserError(f'{self._where}: record {number} has box {list(box)}, which is in shares of '
                      'the picture (0..1), wanted pixels')
    return found


def _listed(value):
  return value if isinstance(value, list | tuple) else [value]


def _is_given(value):
  return value is not None and value != ''


def _word(value):
  """A value as people write it: 2.0 as '2'."""
  if isinstance(value, str):
    return value.strip()
  return str(int(value)) if float(value).is_integer() else repr(float(value))


def _number(value):
  return None if value is None else float(value)
