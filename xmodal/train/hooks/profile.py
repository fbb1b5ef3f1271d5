"""Traces some steps for xprof and TensorBoard."""

from collections.abc import Callable
import os
import re

import jax

from xmodal.errors import UserError
from xmodal.options import Option

OPTIONS = {'profile': Option('', "Steps to trace into WORKDIR/profile, first and last, such as "
                             "'100:110'; '': none.", may_change=True)}


def steps(train) -> tuple[int, int] | None:
  """First and last step (counted from 1) of config.train.profile; None if it is ''.

  Raises:
    UserError: it is no range of the run's steps.
  """
  if not train.profile:
    return None
  found = re.fullmatch(r'(\d+):(\d+)', train.profile, re.ASCII)
  if not found or not 1 <= int(found[1]) <= int(found[2]) <= train.steps:
    raise UserError(f'config.train.profile={train.profile!r}: wanted the first and the last step, '
                    f"such as '100:110', of 1 to config.train.steps={train.steps}")
  return int(found[1]), int(found[2])


class Profiling:
  """Writes a trace of config.train.profile's steps, on the first process and its devices alone.

  The devices finish earlier steps before it begins, and its own before it ends.
  """

  def __init__(self, train, workdir: str, start: int, say: Callable[[str], None]):
    """
    Args:
      train: config.train.
      workdir: folder of the run; the trace goes into its folder 'profile'.
      start: number of steps taken before. Of earlier steps there is no trace.
      say: prints a line for the user.
    """
    self._folder, self._say = os.path.join(workdir, 'profile'), say
    self._first, self._last = steps(train) or (0, 0)
    self._tracing, self._annotation = False, None
    if 0 < self._last <= start:
      say(f'config.train.profile={train.profile!r}: no trace, as the run resumes after step '
          f'{start}')
    if self._last <= start or jax.process_index() != 0:
      self._first, self._last = 0, 0

  def before(self, step: int, state) -> None:
    """Begins the trace if this step is the first of it."""
    if not self._first <= step <= self._last:
      return
    if not self._tracing:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    self._annotation = jax.profiler.StepTraceAnnotation('train', step_num=step)
    self._annotation.__enter__()

  def after(self, step: int) -> bool:
    """Ends the annotation of a step; returns whether it was the last one to trace."""
    self._leave()
    return self._tracing and step == self._last

  def finish(self, state) -> None:
    """Writes the trace once the devices have computed `state`."""
    jax.block_until_ready(state)
    self.close()

  def close(self) -> None:
    """Writes a trace that has begun; what a run that stops early has of it."""
    self._leave()
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      self._say(f'trace in {self._folder}; to look at it: pip install xprof, then '
                f'xprof --logdir {self._folder}')

  def _leave(self):
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None
