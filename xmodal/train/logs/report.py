"""Logging of a run: terminal, metrics.jsonl and TensorBoard."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import os
import sys
import time
import types

import jax
from tqdm import tqdm

from xmodal.options import Option
from xmodal.train.logs import metrics

OPTIONS = {'log_every': Option(20, 'Steps between logged metrics.', low=1, may_change=True)}


class Report:
  """Logs metrics and progress, on the first host only.

  Attributes:
    overdue: names of evaluations that were due at the step the run resumes from, but are missing
      (first host only; empty on others).
  """

  def __init__(self, workdir: str, *, steps: int, start: int, batch_size: int,
               scored: Mapping[str, Collection[str]] = types.MappingProxyType({}),
               evaluates: bool = False):
    """Starts logging of a run of `steps` steps that starts or resumes at step `start`.

    Args:
      workdir: folder of the run.
      steps, start: see above.
      batch_size: examples per step.
      scored: for each evaluation due at step `start`, the tasks that it scores.
      evaluates: whether the run repeats all evaluations of step `start`.
    """
    self._steps, self._batch_size = steps, batch_size
    self._active = jax.process_index() == 0
    self._bar, self.overdue = None, frozenset()
    self._clock, self._clock_step = time.perf_counter(), start
    self._rate, self._timed_steps, self._timed_seconds = 0.0, 0, 0.0
    self._waited, self._waited_of_lap, self._input_wait = 0.0, 0.0, 0.0
    if not self._active:
      return
    if _has_terminal():
      self._bar = tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True, smoothing=0.1)
    self._path = os.path.join(workdir, 'metrics.jsonl')
    lines, unreadable = metrics.read(self._path)
    if unreadable:
      self.say(f'{self._path}: {unreadable} lines cannot be read and are dropped (a crash '
               'truncates lines or leaves NUL bytes)')
    written = {(line['split'], line['task']) for line in lines if line['step'] == start}
    self.overdue = frozenset(name for name, tasks in scored.items() if start > 0
                          and any((name, task) not in written for task in tasks))

    def keep(step, split):
      """Whether a metric stays valid: a killed run may have logged past its last checkpoint."""
      again = split != 'train' and (evaluates or split in self.overdue)
      return step < start or step == start and not again

    kept = [line for line in lines if keep(line['step'], line['split'])]
    metrics.rewrite(self._path, kept)
    from xmodal.train.logs.board import Board  # imports torch where it is installed: seconds
    self._board = Board(os.path.join(workdir, 'tensorboard'), kept, keep)

  def say(self, line: str) -> None:
    """Prints a line for the user, above the progress bar."""
    if self._active:
      tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, flush=True)

  def train(self, step: int, numbers: dict[str, float]) -> None:
    """Logs metrics of a training step, and since the last call or pause: examples/s, and the share
    of the time (0..1) in which the loop waited for input."""
    self._lap(step)
    self.write(step, 'train', {**numbers, 'examples_per_second': self._rate,
                               'input_wait': self._input_wait})
    if not self._active or self._bar is not None:
      return
    left = (self._steps - step) * self._batch_size / max(self._rate, 1e-9)
    self.say(f'step {step}/{self._steps}  {_summary(numbers)}  {self._rate:.0f} examples/s  '
             f'{left / 60:.1f} min left')

  def advance(self, step: int, numbers: dict[str, float]) -> None:
    """Moves the progress bar."""
    if self._bar is not None:
      self._bar.n = step
      self._bar.set_postfix_str(f'{_summary(numbers)}, {self._rate:.0f} examples/s')

  @contextlib.contextmanager
  def pause(self, step: int) -> Iterator[None]:
    """Excludes work after a step (compilation, an evaluation) from examples/s."""
    self._lap(step)
    yield
    self._clock = time.perf_counter()
    if self._bar is not None:
      self._bar.unpause()  # excludes it from the remaining time, too

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts as waiting for input."""
    began = time.perf_counter()
    yield
    self._waited_of_lap += time.perf_counter() - began

  def _lap(self, step):
    now = time.perf_counter()
    if steps := step - self._clock_step:
      seconds = max(now - self._clock, 1e-9)
      self._timed_steps += steps
      self._timed_seconds += seconds
      self._waited += self._waited_of_lap
      self._rate = steps * self._batch_size / seconds
      self._input_wait = self._waited_of_lap / seconds
    self._clock, self._clock_step, self._waited_of_lap = now, step, 0.0

  @property
  def examples_per_second(self) -> float:
    """Mean since this start of the run, without compilation and evaluations."""
    return self._timed_steps * self._batch_size / max(self._timed_seconds, 1e-9)

  @property
  def input_wait(self) -> float:
    """Share (0..1) of that time in which the loop waited for input."""
    return self._waited / max(self._timed_seconds, 1e-9)

  def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
    """Writes metrics of one step to TensorBoard and metrics.jsonl.

    metrics.jsonl gets a line per task for the metrics 'task/name', and a line of the task 'all' for
    the others; a number that is not finite becomes null.
    """
    if not self._active:
      return
    by_task = {}
    for key, number in numbers.items():
      task, _, name = key.partition('/')
      if not name:
        task, name = 'all', key
      by_task.setdefault(task, {})[name] = number
    metrics.append(self._path, [{'step': step, 'split': split, 'task': task, **named}
                                for task, named in by_task.items()])
    self._board.add(step, split, numbers)

  def close(self) -> None:
    """Ends the progress bar."""
    if self._bar is not None:
      self._bar.close()


def _summary(numbers):
  parts = [f'loss {numbers["loss"]:.3f}']
  if any(key.endswith('/share') for key in numbers):  # the total is of the step's tasks only
    parts = ['loss ' + ', '.join(f'{key.removesuffix("/loss")} {value:.3f}' for key, value
                                 in numbers.items() if key.endswith('/loss'))]
  parts += [f'{key.replace("/", " ")} {value:.1%}' for key, value in numbers.items()
            if key.endswith(('/accuracy', '/iou'))]
  if numbers['skipped']:
    parts.append(f'{numbers["skipped"]:.0f} steps skipped (gradients not finite)')
  return ', '.join(parts)


def _has_terminal():
  """Whether stderr is a terminal with room for a bar; some remote terminals report no size."""
  try:
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
  except (OSError, ValueError):
    return False
