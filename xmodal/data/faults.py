"""Faults in data that training can skip: one line for each, and counts by kind."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

from xmodal.data import fields
from xmodal.data.example import Example, Source
from xmodal.data.fields import Complaint, shown
from xmodal.errors import UserError

# Annotation tools round coordinates, so half a pixel beyond the edge is accepted.
SLACK_PIXELS = 0.5

# In the line of one fault, {} is the value found; the counts leave it out.
NO_AREA = 'box {} has no area, left out'
OUTSIDE = 'box {} is outside the picture, left out'
CLIPPED = 'box {} reaches out of the picture, clipped to it'
MALFORMED = 'box {} is not four finite numbers, left out'
SHARES = 'box {} is in shares of the picture (0..1), wanted pixels, left out'

_FIRST = 5


class Fault(str):
  """One line, such as 'FILE: annotation 17: box [3, 4, 0, 9] has no area, left out'.

  Attributes:
    kind: name under which similar faults are counted: 'box has no area, left out'.
  """

  kind: str

  def __new__(cls, line: str, kind: str):
    self = super().__new__(cls, line)
    self.kind = kind
    return self

  def __getnewargs__(self):
    return str(self), self.kind


def fault(where: str, what: str, value: Any = '') -> Fault:
  """The Fault for a place, a description ('box {} has no area') and the value found."""
  return Fault(f'{where}: {what.format(shown(value))}', what.replace(' {}', ''))


class Examples(list[Example]):
  """The examples of a split, with the faults and categories of its files.

  Attributes:
    faults: everything that was left out or repaired, a line each.
    categories: name -> number of each category listed in the files; {} if none.
  """

  def __init__(self, examples: Iterable[Example], faults: Iterable[Fault],
               categories: Mapping[str, int | str] | None = None):
    super().__init__(examples)
    self.faults: tuple[Fault, ...] = tuple(faults)
    self.categories: dict[str, int | str] = dict(categories or {})


def usable_box(
    box: Any, size: tuple[float, float]
) -> tuple[tuple[float, float, float, float] | None, str]:
  """Clips a box to its picture, and says what is wrong with it.

  Args:
    box: (x, y, width, height) in pixels as read from a file; may be malformed.
    size: (width, height) of the picture in pixels, infinite if unknown.

  Returns:
    The box, or None if it cannot be used; and NO_AREA, OUTSIDE, CLIPPED, MALFORMED,
    SHARES or ''. A box that exceeds the picture by at most SLACK_PIXELS is unchanged.
  """
  try:
    x, y, width, height = box
    finite = math.isfinite(x + y + width + height)
  except (TypeError, ValueError, OverflowError):
    finite = False
  if not finite:
    return None, MALFORMED
  if width <= 0 or height <= 0:
    return None, NO_AREA
  if in_shares(box):
    return None, SHARES
  left, top = max(x, 0), max(y, 0)
  right, bottom = min(x + width, size[0]), min(y + height, size[1])
  if left >= right or top >= bottom:
    return None, OUTSIDE
  if max(left - x, top - y, x + width - right, y + height - bottom) > SLACK_PIXELS:
    return (float(left), float(top), float(right - left), float(bottom - top)), CLIPPED
  return (float(x), float(y), float(width), float(height)), ''


def usable_name(value: Any, where: str, faults: list[Fault]) -> str:
  """The name of an object on one line; '' if it is invalid, which is added to faults."""
  if value is None or (isinstance(value, str) and not value.strip()):
    faults.append(fault(where, 'has no name, left out'))
    return ''
  try:
    return fields.name(value)
  except Complaint as complaint:
    faults.append(Fault(f'{where}: name {complaint}, left out', 'name is no text, left out'))
    return ''


def in_shares(box: Sequence[float]) -> bool:
  """Whether a box (x, y, width, height) must be in shares of its picture, not in pixels.

  In pixels it would lie within the first pixel and be smaller than it. A box of whole numbers is
  in pixels: (0, 0, 1, 1) may be a single one.
  """
  return 0 <= min(box) and max(box) <= 1 and any(side % 1 for side in box)


def picture_size(record: Any, where: str, faults: list[Fault]) -> tuple[float, float]:
  """(width, height) in pixels from a picture's record, infinite if it has none.

  null and 0 count as none; other invalid values are added to faults.
  """
  sizes, complaints = fields.check_fields(record, _SIZE)
  faults += [Fault(f'{where}: {line}; its size is taken as not known',
                   'size of a picture is no number of pixels, taken as not known')
             for line in complaints]
  width, height = (sizes.get(side) or math.inf for side in _SIZE)
  return (width, height) if width < math.inf and height < math.inf else (math.inf, math.inf)


def known_size(size: tuple[float, float]) -> tuple[float, float] | None:
  """The result of picture_size as Example.recorded_size: None if unknown."""
  return size if size[0] < math.inf else None


def _pixels(value):
  if (found := fields.number(value)) < 0:
    raise Complaint(f'is {shown(value)}, wanted a number of pixels')
  return found


_SIZE = {side: fields.optional(_pixels) for side in ('width', 'height')}


def count_kinds(faults: Sequence[Fault]) -> str:
  """Counts by kind: '3 x box has no area, left out; 1 x ...'."""
  kinds = collections.Counter(f.kind for f in faults)
  return '; '.join(f'{count:,} x {kind}' for kind, count in kinds.most_common())


def fault_notes(split: str, source: Source, flags: str) -> list[str]:
  """Lines on a split's faults: counts by kind, the first few, and the command that lists them all.

  Args:
    split: the split's name in messages.
    source: any source; most have no faults.
    flags: flags of xmodal.data.check that read the same split.
  """
  faults = getattr(source, 'faults', ())
  if not faults:
    return []
  return [f'{split}: {count_kinds(faults)}', *(f'  {line}' for line in faults[:_FIRST]),
          f'  all of them: xmodal check {flags}']


def check_left(source: Source, name: str, flags: str) -> None:
  """Raises UserError if no example of a source has an object or an expression."""
  if any(example.objects or example.expression for example in source):
    return
  faults = getattr(source, 'faults', ())
  why = f': {count_kinds(faults)}; all: xmodal check {flags}' if faults else ''
  raise UserError(f'{name}: none of {len(source)} examples to train on has a box that can be '
                  f'used{why}')
