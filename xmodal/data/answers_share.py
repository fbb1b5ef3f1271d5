"""Training on fewer answers: a share of the records keeps them."""

import dataclasses

import numpy as np

from xmodal.data import order
from xmodal.data.example import Example, Source

# Of the permutation that chooses which records keep their answers: no epoch has this number.
_ANSWERED = 2**32


class PartlyAnswered:
  """A source of which a share of the records keep their answers.

  Whether a record does is a function of its number, the number of records and the seed.

  Args:
    source: with answers.
    share: 0..1, rounded to whole records, at least one.
    seed: another seed, other records.
    only: leaves the other records out; else they come without answers and the reason, which
      gives the answer away, and with all else of theirs.
  """

  def __init__(self, source: Source, share: float, seed: int, *, only: bool = False):
    size = len(source)
    self._source = source
    self._answered = (order.permute(np.arange(size), size, seed, _ANSWERED)
                      < max(1, round(share * size)))
    self._records = np.flatnonzero(self._answered) if only else np.arange(size)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = int(self._records[index])
    example = self._source[record]
    return (example if self._answered[record]
            else dataclasses.replace(example, answers=(), reason=''))
