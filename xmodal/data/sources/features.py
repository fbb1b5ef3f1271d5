"""Which features of a data set that another library reads fill our fields. For tfds and hf.

config.data.fields names the feature of each field: (('image', 'photo'), ('box', 'objects/bbox')). A
feature inside another is written with a slash. Fields and what their features hold in one record:

  image: a picture.
  image_id, question_id: a number or text.
  question: text; a list of texts gives one Example each.
  answers: text, a name of a class or a number, or a list of them; one of these for each question
    if there are several. Without a feature of questions, all have the question
    config.data.question.
  question_type, reason: text. number: a number. caption: text or a list of texts.
  box, name, ignore: lists, one entry per object.
  expression: a list of texts for each box, or one text; gives one Example for each text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from xmodal.data.faults import Fault
from xmodal.data.sources import columns
from xmodal.errors import UserError, did_you_mean
from xmodal.options import Option

OPTIONS = {
    'name': Option('', 'Name of the data set in its library, such as coco/2017 or owner/name.',
                   may_change=True), **columns.OPTIONS, **columns.QUESTION}

PICTURE, TEXT, CLASS = 'a picture', 'text', 'a class'
NUMBER, FLAG, BOX = 'a number', 'a flag', 'a box'
_DEPTHS = ('once a record', 'in a list', 'in a list of lists')
_WORDS = (TEXT, CLASS)
# Field -> kinds of value that its feature may hold, and in how many lists they may lie.
_WANTED = {
    'image': ((PICTURE,), (0,)), 'image_id': ((NUMBER, TEXT), (0,)), 'question': ((TEXT,), (0, 1)),
    'question_id': ((NUMBER, TEXT), (0, 1)), 'question_type': (_WORDS, (0, 1)),
    'answers': ((*_WORDS, NUMBER), (0, 1, 2)), 'caption': ((TEXT,), (0, 1)),
    'number': ((NUMBER,), (0, 1)), 'reason': ((TEXT,), (0, 1)), 'box': ((BOX,), (1,)),
    'name': ((*_WORDS, NUMBER), (1,)), 'ignore': ((FLAG, NUMBER), (1,)),
    'expression': ((TEXT,), (1, 2))}
_OF_OBJECTS = ('box', 'name', 'ignore')
# Field -> names that its feature often has.
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
OF_A_QUESTION = ('question', 'question_id', 'question_type', 'answers', 'number', 'reason')


@dataclasses.dataclass(frozen=True)
class Feature:
  """One feature of a data set.

  Attributes:
    keys: its name, such as ('objects', 'bbox').
    kind: what it holds: PICTURE, ..., BOX; '' if none of them.
    depth: the number of lists around each value: 0 for one value a record.
    type: its type as the library writes it, for messages.
    convert: the library's value -> bytes or path of a picture, text, name of a class, number, bool,
      four numbers of a box; None: it is that already.
  """

  keys: tuple[str, ...]
  kind: str
  depth: int
  type: str
  convert: Callable[[Any], Any] | None = None

  @property
  def path(self) -> str:
    """Its name, such as 'objects/bbox'."""
    return '/'.join(self.keys)

  def read(self, record: Any) -> Any:
    """The value in a record, in `depth` lists; None where it is missing."""
    return _nested(_inside(record, self.keys), self.depth, self.convert)

  def __str__(self) -> str:
    if self.depth < len(_DEPTHS):
      return f'{self.path!r}, {self.type} {_DEPTHS[self.depth]}'
    return f'{self.path!r}, {self.type} in lists'


def _inside(value, keys):
  """What lies under some keys of a record; objects may be a list of dicts or a dict of lists."""
  if not keys or value is None:
    return value
  if isinstance(value, list):
    return [_inside(item, keys) for item in value]
  return _inside(value[keys[0]], keys[1:])


def _nested(value, depth, convert):
  if value is None:
    return [] if depth else None
  if depth:
    return [_nested(item, depth - 1, convert) for item in value]
  return value if convert is None else convert(value)


def class_name(names: Sequence[str], number: int) -> str | None:
  """The name of a class; None for -1: not known, as in many test splits."""
  return names[number] if number >= 0 else None


def match(usual: Mapping[str, str], fields: Iterable, features: Mapping[str, Feature], where: str
          ) -> dict[str, Feature]:
  """The feature of each field.

  Args:
    usual: field -> path of its feature, where `fields` names no other.
    fields: the value of config.data.fields; '' leaves a field out.
    features: all features by path.
    where: the data set, for messages.

  Raises:
    UserError: there is no such field or feature, a feature holds something else, or none has
      pictures.
  """
  matched = {}
  for field, path in {**usual, **columns.pairs(fields, _WANTED)}.items():
    if not path:
      continue
    if path not in features:
      raise UserError(f'{where}: no column {path!r} for {field!r}{did_you_mean(path, features)}; '
                      f'its columns: {", ".join(features)}; set config.data.fields')
    feature, (kinds, depths) = features[path], _WANTED[field]
    if feature.kind not in kinds or feature.depth not in depths:
      lists = ' or '.join(_DEPTHS[depth] for depth in depths)
      raise UserError(f'{where}: column {feature}, cannot be {field!r}, wanted '
                      f'{" or ".join(kinds)}, {lists}; set config.data.fields')
    matched[field] = feature
  if 'image' not in matched:
    found = '; '.join(map(str, features.values()))
    raise UserError(f'{where}: no column of pictures found among {found}; set '
                    "config.data.fields=(('image', 'COLUMN'),)")
  _check_together(matched, where)
  return matched


def find(features: Mapping[str, Feature]) -> dict[str, str]:
  """Field -> path of its feature, for features with common names."""
  found = {}
  for field, names in _COMMON.items():
    kinds, depths = _WANTED[field]
    found |= next(({field: path} for path in names if (feature := features.get(path))
                   and feature.kind in kinds and feature.depth in depths), {})
  if 'name' not in found or 'box' not in found:
    found = {field: path for field, path in found.items() if field not in _OF_OBJECTS}
  return found


def unread_boxes(matched: Mapping[str, Feature], fields: Iterable, features: Mapping[str, Feature],
                 where: str) -> list[Fault]:
  """A line on each column of boxes if no field reads one and config.data.fields leaves none out."""
  if 'box' in matched or 'box' in columns.pairs(fields, _WANTED):
    return []
  return [Fault(f'{where}: column {feature}, is not read, as no column with a usual name has its '
                f"names; set config.data.fields=(('box', {path!r}), ('name', 'COLUMN'))",
                'column of boxes is not read')
          for path, feature in features.items()
          if feature.kind == BOX and feature.depth in _WANTED['box'][1]]


def _check_together(matched, where):
  if 'box' in matched and not {'name', 'expression'} & matched.keys():
    raise UserError(f'{where}: column {matched["box"].path!r} has boxes, and no column their '
                    "names; set config.data.fields=(('name', 'COLUMN'),)")
  if lonely := [field for field in ('name', 'ignore', 'expression')
                if field in matched and 'box' not in matched]:
    raise UserError(f'{where}: column {matched[lonely[0]].path!r} is {lonely[0]!r}, which needs '
                    "boxes; set config.data.fields=(('box', 'COLUMN'),)")
  several = 'question' in matched and matched['question'].depth == 1
  if several and 'expression' in matched:
    raise UserError(f'{where}: several questions and several expressions in one record cannot be '
                    'read together; leave one out of config.data.fields')
  for field in filter(matched.get, OF_A_QUESTION):
    if matched[field].depth not in (several, several + (field == 'answers')):
      raise UserError(
          f'{where}: column {matched[field]}, cannot be {field!r}, wanted '
          f'{"one entry for each question" if several else "one for a record"}; '
          'set config.data.fields')
