"""What is wrong with data that training can go on without: said line by line, and counted."""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

from xmodal.data.example import Example, Source
from xmodal.data.files import shown
from xmodal.errors import UserError

# Annotation tools round: half a pixel beyond the edge is no mistake.
SLACK_PIXELS = 0.5

# {} is where the value found stands in the line of one fault; the count leaves it out.
NO_AREA = 'box {} has no area, left out'
OUTSIDE = 'box {} is outside the picture, left out'
CLIPPED = 'box {} reaches out of the picture, clipped to it'
MALFORMED = 'box {} is not four finite numbers, left out'

_FIRST = 5


class Fault(str):
  """One line, such as 'FILE: annotation 17: box [3, 4, 0, 9] has no area, left out'.

  Attributes:
    kind: what faults alike are counted under: 'box has no area, left out'.
  """

  kind: str

  def __new__(cls, line: str, kind: str):
    self = super().__new__(cls, line)
    self.kind = kind
    return self


def fault(where: str, what: str, value: Any = '') -> Fault:
  """Of a place, what is wrong there ('box {} has no area'), and the value found."""
  return Fault(f'{where}: {what.format(shown(value))}', what.replace(' {}', ''))


class Examples(list[Example]):
  """The examples of a split, and what is wrong with its files.

  Attributes:
    faults: all that was left out or mended, a line each.
  """

  def __init__(self, examples: Iterable[Example], faults: Iterable[Fault]):
    super().__init__(examples)
    self.faults: tuple[Fault, ...] = tuple(faults)


def usable_box(
    box: Any, size: tuple[float, float]
) -> tuple[tuple[float, float, float, float] | None, str]:
  """The part of a box that lies in its picture, and what is wrong with the box.

  Args:
    box: (x, y, width, height) in pixels as a file has it, or anything else.
    size: (width, height) of the picture in pixels, infinite where not known.

  Returns:
    The box, None where it cannot be used; and NO_AREA, OUTSIDE, CLIPPED, MALFORMED
    or ''. A box that reaches out by SLACK_PIXELS or less stays as it is.
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
  left, top = max(x, 0), max(y, 0)
  right, bottom = min(x + width, size[0]), min(y + height, size[1])
  if left >= right or top >= bottom:
    return None, OUTSIDE
  if max(left - x, top - y, x + width - right, y + height - bottom) > SLACK_PIXELS:
    return (float(left), float(top), float(right - left), float(bottom - top)), CLIPPED
  return (float(x), float(y), float(width), float(height)), ''


def picture_size(width: Any, height: Any) -> tuple[float, float]:
  """(width, height) in pixels as a file has them, infinite where it has none that can be."""
  try:
    if 0 < width < math.inf and 0 < height < math.inf:
      return width, height
  except TypeError:
    pass
  return math.inf, math.inf


def count_kinds(faults: Sequence[Fault]) -> str:
  """How many of each kind: '3 x box has no area, left out; 1 x ...'."""
  kinds = collections.Counter(f.kind for f in faults)
  return '; '.join(f'{count:,} x {kind}' for kind, count in kinds.most_common())


def fault_notes(split: str, source: Source, flags: str) -> list[str]:
  """What a run says of a split's faults: their kinds, the first few, and how to list them all.

  Args:
    split: what the run calls it.
    source: of any kind; most have no faults.
    flags: of xmodal.data.check, to read the same split.
  """
  faults = getattr(source, 'faults', ())
  if not faults:
    return []
  return [f'{split}: {count_kinds(faults)}', *(f'  {line}' for line in faults[:_FIRST]),
          f'  all of them: python -m xmodal.data.check {flags}']


def check_left(source: Source, name: str, flags: str) -> None:
  """Raises UserError if no example of a source has an object or an expression."""
  if any(example.objects or example.expression for example in source):
    return
  faults = getattr(source, 'faults', ())
  why = f': {count_kinds(faults)}; all: python -m xmodal.data.check {flags}' if faults else ''
  raise UserError(f'{name}: none of {len(source)} examples to train on has a box that can be '
                  f'used{why}')
