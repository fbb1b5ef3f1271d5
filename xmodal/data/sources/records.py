"""Records that another library reads, as Examples. For tfds and hf."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import functools
import hashlib
import itertools
import math
import os

from xmodal import atomic, paths
from xmodal.data.example import Example, Object, Packed
from xmodal.data.faults import Fault, in_shares
from xmodal.data.overview import Overview, gathered
from xmodal.data.pictures import images
from xmodal.data.sources.features import OF_A_QUESTION, Feature
from xmodal.data.sources.files import MissingSplit
from xmodal.errors import UserError


def boxes_in_shares(box: Sequence[float], width: float, height: float) -> tuple[float, ...]:
  """A box (ymin, xmin, ymax, xmax) in 0..1 -> (x, y, width, height) in pixels, to 0.001 pixel.

  Rounding undoes float32, in which an edge may lie a little outside its picture.
  """
  ymin, xmin, ymax, xmax = box
  return _rounded(xmin * width, ymin * height, (xmax - xmin) * width, (ymax - ymin) * height)


def corners(box: Sequence[float]) -> tuple[float, ...]:
  """A box (xmin, ymin, xmax, ymax) in pixels -> (x, y, width, height)."""
  xmin, ymin, xmax, ymax = box
  return _rounded(xmin, ymin, xmax - xmin, ymax - ymin)


def sides(box: Sequence[float]) -> tuple[float, ...]:
  """A box (x, y, width, height) in pixels, to 0.001 pixel."""
  return _rounded(*box)


def _rounded(*edges):
  return tuple(round(float(edge), 3) for edge in edges)


class Records(Sequence[Example]):
  """A split as Examples, each made from its record on access; any thread may read.

  A process may get it by pickle, if `read` gives records that can be pickled. Pictures are Packed.

  Attributes:
    is_whole: see pipeline.sample.
    faults: as of faults.Examples.
  """

  is_whole = True

  def __init__(self, read: Callable[[Iterable[Feature]], Sequence], features: Mapping[str, Feature],
               question: str, to_pixels: Callable, where: str, faults: Iterable[Fault] = (),
               fingerprint: str = ''):
    """
    Args:
      read: gives the records with only some features, for several threads at once.
      features: the feature of each field.
      question: of Examples with answers or a number, where no feature has questions.
      to_pixels: box -> (x, y, width, height) in pixels; boxes_in_shares also gets the size of the
        picture, whose header is read for it.
      where: the split, for messages and names of pictures.
      faults: lines on columns that are not read.
      fingerprint: tells these Examples from any others, if their overview is to be kept in the
        user's cache, as reading all takes long.

    If a record may give several Examples, all are counted here, which reads the whole split.

    Raises:
      MissingSplit: there are no Examples.
    """
    self.faults, self._fingerprint = tuple(faults), fingerprint
    self._features, self._where = dict(features), where
    self._image = self._features.pop('image')
    self._question, self._to_pixels = question, to_pixels
    self._needs_size = 'box' in features and to_pixels is boxes_in_shares
    self._pictures = read([self._image])
    wanted = [*self._features.values(), *[self._image] * self._needs_size]
    self._records = read(wanted) if wanted else [{}] * len(self._pictures)
    self._splits = next((feature for field in ('expression', 'question')
                         if (feature := features.get(field)) and feature.depth > 0), None)
    self._ends = None
    if self._splits:
      self._ends = list(itertools.accumulate(
          len(self._parts(record)) for record in read([self._splits])))
    if not len(self):
      raise MissingSplit(f'{where}: has no examples; take another split')

  @functools.cached_property
  def overview(self) -> Overview:
    """See data.overview; the examples that do not read as English are counted."""
    folder = self._fingerprint and paths.cache('overviews')
    if not folder:
      return gathered(self, languages=True)
    path = os.path.join(folder, hashlib.sha256(self._fingerprint.encode()).hexdigest()[:24])
    if (kept := Overview.load(path, self._fingerprint)) is not None:
      return kept
    found = gathered(self, languages=True)
    with contextlib.suppress(OSError), atomic.written(path, 'wb') as f:  # a full disk
      found.save(f, self._fingerprint)
    return found

  def __getstate__(self):
    return {key: value for key, value in vars(self).items() if key != 'overview'}

  def __len__(self) -> int:
    if self._ends is None:
      return len(self._pictures)
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]
    if self._ends is None:
      return self._example(index, self._records[index], None)
    number = bisect.bisect(self._ends, index)
    record = self._records[number]
    place = index - (self._ends[number - 1] if number else 0)
    return self._example(number, record, self._parts(record)[place])

  def __iter__(self):
    for number, record in enumerate(self._records):  # each once
      for part in self._parts(record) if self._splits else [None]:
        yield self._example(number, record, part)

  def _parts(self, record):
    """What each Example of a record is about: (number of the question or box, expression)."""
    found = self._splits.read(record)
    if found is None:
      return []
    if self._splits is not self._features.get('expression'):
      return [(place, None) for place in range(len(found))]
    return [(place, text) for place, texts in enumerate(found)
            for text in (texts if self._splits.depth == 2 else [texts]) if text and text.strip()]

  def _place(self, number):
    return f'{self._where}: record {number}'

  def _picture(self, number):
    """The bytes of a record's picture file."""
    found = self._image.read(self._pictures[number])
    if found is None:
      raise UserError(f'{self._place(number)} has no picture')
    return images.read_bytes(found)[0]

  def _example(self, number, record, part):
    values = {field: feature.read(record) for field, feature in self._features.items()}
    if part is not None and part[1] is None:  # one of several questions
      values |= {field: values[field][part[0]] for field in OF_A_QUESTION if field in values}
    answers = tuple(map(_word, filter(_is_given, _listed(values.get('answers')))))
    question = values.get('question') or ''
    if (answers or values.get('number') is not None) and 'question' not in values:
      question = self._question
    objects, expression = None, None
    if 'box' in values:
      objects, expression = self._objects(number, record, values, part)
    return Example(
        Packed(self._place(number), functools.partial(self._picture, number)),
        image_id=values.get('image_id'), question=question.strip(), answers=answers,
        question_id=values.get('question_id'), question_type=values.get('question_type') or '',
        captions=tuple(text.strip() for text in filter(_is_given, _listed(values.get('caption')))),
        objects=objects, expression=expression, number=_number(values.get('number')),
        reason=(values.get('reason') or '').strip())

  def _objects(self, number, record, values, part):
    """The objects of a record (None if it has no names of them), and the expression of a part."""
    size = ()
    if self._needs_size and not (size := images.stored_size(self._image.read(record) or b'')):
      return None, None  # unreadable: decoding will say so
    pixels = [self._checked(number, box, size) for box in values['box']]
    objects = None
    if 'name' in values:
      ignored = values.get('ignore') or [False] * len(pixels)
      objects = tuple(Object(' '.join(_word(name).split()), box, bool(ignore))
                      for name, box, ignore in zip(values['name'], pixels, ignored)
                      if name is not None and _word(name).strip())
    if part is None or part[1] is None:
      return objects, None
    return objects, Object(' '.join(part[1].split()), pixels[part[0]])

  def _checked(self, number, box, size):
    if box is None or len(box) != 4 or None in box or not all(map(math.isfinite, box)):
      raise UserError(f'{self._place(number)} has box {box and list(box)}, wanted four finite '
                      'numbers')
    found = self._to_pixels(box, *size)
    if not self._needs_size and in_shares(found):
      raise UserError(f'{self._place(number)} has box {list(box)}, which is in shares of the '
                      'picture (0..1), wanted pixels')
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
