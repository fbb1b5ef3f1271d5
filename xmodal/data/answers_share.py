"""Training with fewer labels: only a share of the records keeps its answers."""

import dataclasses

import numpy as np

from xmodal.data import order
from xmodal.data.example import Example, Source

# Epoch number of the permutation that chooses the answered records; no real epoch reaches it.
_ANSWERED = 2**32


class PartlyAnswered:
  """A source in which only a share of the records keeps its answers.

  Which records do is a function of their number, the number of records and the seed.

  Args:
    source: a source with answers.
    share: 0..1, rounded to whole records, at least one.
    seed: selects the records.
    only: if true, the other records are left out; otherwise they lose their answers and the
      reason, which reveals the answer, and keep all other fields.
  """

  def __init__(self, source: Source, share: float, seed: int, *, only: bool = False):
    size = len(source)
    self._source = source
    self._answered = (order.permute(np.arange(size), size, seed, _ANSWERED)
                      < max(1, round(share * size)))
    self._records = np.flatnonzero(self._answered) if only else np.arange(size)

  @property
  def is_whole(self) -> bool:
    """See pipeline.sample."""
    return getattr(self._source, 'is_whole', isinstance(self._source, list))

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = int(self._records[index])
    example = self._source[record]
    return (example if self._answered[record]
            else dataclasses.replace(example, answers=(), reason=''))
