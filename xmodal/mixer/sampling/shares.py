"""Trains one task per step; each task gets a share of the steps."""

from collections.abc import Mapping, Sequence

import numpy as np

from xmodal.mixer.sampling.sampling import SAMPLINGS, Sampling, StepKind
from xmodal.options import Option

# Steps per cycle: shares are rounded to 1%.
_CYCLE = 100


@SAMPLINGS.register('round_robin')
def round_robin(sizes: Mapping[str, int], seed: int) -> Sampling:
  """Trains the tasks in turn."""
  del seed
  return Sampling(_kinds(sizes), tuple((i, 1) for i in range(len(sizes))))


@SAMPLINGS.register('proportional')
def proportional(sizes: Mapping[str, int], seed: int) -> Sampling:
  """Shares in proportion to the number of examples."""
  return temperature(sizes, seed, 1.0)


@SAMPLINGS.register('temperature', options={
    # Below 0.1, powers of sizes overflow.
    'temperature': Option(2.0, 'Shares in proportion to size ** (1 / temperature).', low=0.1)})
def temperature(sizes: Mapping[str, int], seed: int, temperature: float) -> Sampling:
  """Shares in proportion to a power of the number of examples (arXiv:1910.10683, section 3.5.2)."""
  counts = apportion([size ** (1 / temperature) for size in sizes.values()],
                     max(_CYCLE, len(sizes)))
  return Sampling(_kinds(sizes), tuple(enumerate(counts)), seed)


def _kinds(sizes):
  return tuple(StepKind((task,)) for task in sizes)


def apportion(amounts: Sequence[float], total: int) -> list[int]:
  """Integers in proportion to amounts, each at least 1, whose sum is total.

  Uses largest remainders (Hamilton's method). If the minimum of 1 raises the sum above total,
  the counts that exceed their quota most are reduced.
  """
  due = np.asarray(amounts, float) / np.sum(amounts) * total
  counts = np.maximum(np.floor(due).astype(int), 1)
  while counts.sum() < total:
    counts[np.argmax(due - counts)] += 1
  while counts.sum() > total:
    counts[np.argmax(np.where(counts > 1, counts - due, -np.inf))] -= 1
  return counts.tolist()
