"""Examples labelled by a model (xmodal augment): used for training, never for evaluation."""

import bisect
from collections.abc import Sequence
import itertools

from xmodal.data.example import Example, Source
from xmodal.errors import UserError


class Concatenated:
  """A concatenation of several sources.

  Attributes:
    parts: the sources.
    faults: the faults of all of them.
  """

  def __init__(self, parts: Sequence[Source]):
    self.parts = tuple(parts)
    self.faults = tuple(fault for part in parts for fault in getattr(part, 'faults', ()))
    self._ends = tuple(itertools.accumulate(map(len, parts)))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Example:
    number = bisect.bisect(self._ends, index)
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self.parts[number][index - (self._ends[number - 1] if number else 0)]


def count_made(source: Source) -> int:
  """Number of examples that a model made; a generated source has none."""
  parts = getattr(source, 'parts', (source,))
  return sum(getattr(part, 'num_made', 0) for part in parts) + sum(
      example.made for part in parts if isinstance(part, list) for example in part)


def made_notes(use: str, source: Source) -> list[str]:
  """A line with the number of examples that a model made; [] if none."""
  made = count_made(source)
  return [f'{use}: {made} of {len(source)} examples were made by a model'] if made else []


def check_none_made(source: Source, name: str) -> None:
  """Raises UserError if a model made any of the examples to evaluate on."""
  if made := count_made(source):
    raise UserError(f'{name}: {made} of {len(source)} examples to evaluate on were made by a model '
                    '("made": true); leave them out, or set config.data.eval_split')
