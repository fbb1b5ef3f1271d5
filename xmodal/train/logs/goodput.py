"""Goodput: the share of a run's time that went into steps it still has, over all its starts.

The time of a start is that of its process from the opening of the data to its end: steps (waiting
for input included), and what counts as lost: compilation, evaluations, saving, and steps that a
later start repeats because it resumed from an older checkpoint. Time between the end of a start and
the next start does not count, for it would be a difference of two machines' clocks. Each start is
measured by its own monotonic clock, which nobody sets back.
"""

from collections.abc import Callable
import json
import os
import time

from xmodal import atomic

FILE = 'goodput.json'
_WRITE_SECONDS = 10.0  # between writes: a kill loses the count of that much time
_KEYS = {'from_step': int, 'to_step': int, 'seconds': float, 'step_seconds': float}


class Goodput:
  """Adds up the time of all starts, kept in WORKDIR/goodput.json, one object a start."""

  def __init__(self, workdir: str, start: int, began: float, *, writes: bool = True,
               clock: Callable[[], float] = time.monotonic):
    """Begins the account of a start.

    Args:
      workdir: folder of the run; a missing or damaged file counts as no earlier start.
      start: number of steps taken before.
      began: when this start began, by the clock.
      writes: whether to write the file.
      clock: seconds, monotonic.
    """
    self._path, self._began, self._clock = os.path.join(workdir, FILE), began, clock
    self._writes, self._written = writes, None
    self._now = {'from_step': start}
    self._earlier = _read(self._path)
    self.note(start, 0.0)

  def note(self, step: int, step_seconds: float, *, soon: bool = False) -> None:
    """Notes the time up to a step.

    Args:
      step: number of steps taken.
      step_seconds: of the steps of this start.
      soon: if true, writes only if the last write is some seconds ago.
    """
    now = self._clock()
    self._now |= {'to_step': step, 'seconds': now - self._began, 'step_seconds': step_seconds}
    if self._writes and not (soon and now - self._written < _WRITE_SECONDS):
      self._written = now
      with atomic.written(self._path) as f:
        f.write(json.dumps({'starts': [*self._earlier, self._now], **self.total()}, indent=1))

  def total(self) -> dict[str, float]:
    """The share (0..1) 'goodput', 'total_seconds' of all starts, and how many: 'num_starts'."""
    starts = [*self._earlier, self._now]
    total = sum(one['seconds'] for one in starts)
    useful, until = 0.0, float('inf')
    for one in reversed(starts):
      steps = one['to_step'] - one['from_step']
      # Of a start whose last steps were repeated, each step counts as its mean step.
      kept = max(min(one['to_step'], until) - one['from_step'], 0)
      useful += one['step_seconds'] * kept / max(steps, 1)
      until = min(until, one['from_step'])
    return {'goodput': round(useful / max(total, 1e-9), 4), 'total_seconds': round(total, 1),
            'num_starts': len(starts)}


def _read(path):
  try:
    with open(path, encoding='utf-8') as f:
      starts = json.load(f)['starts']
    return [{key: kind(one[key]) for key, kind in _KEYS.items()} for one in starts]
  except (OSError, ValueError, KeyError, TypeError):
    return []
