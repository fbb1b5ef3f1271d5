"""Logging of a run: terminal, metrics.jsonl and trackers."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import os
import sys
import types

import jax
from tqdm import tqdm

from xmodal.options import Option
from xmodal.train.logs import metrics
from xmodal.train.logs.goodput import Goodput
from xmodal.train.logs.speed import Speed
from xmodal.train.logs.trackers.tracker import Run, Trackers

OPTIONS = {'log_every': Option(20, 'Steps between logged metrics.', low=1, may_change=True)}


class Report:
  """Logs metrics and progress, on the first host only.

  Attributes:
    overdue: names of evaluations that were due at the step the run resumes from, but are missing
      (first host only; empty on others).
    speed: how fast steps run.
    costs: what the steps cost; None before they are compiled.
  """

  def __init__(self, workdir: str, *, steps: int, start: int, batch_size: int,
               scored: Mapping[str, Collection[str]] = types.MappingProxyType({}),
               evaluates: bool = False, config=None, goodput: Goodput | None = None):
    """Starts logging of a run of `steps` steps that starts or resumes at step `start`.

    Args:
      workdir: folder of the run.
      steps, start: see above.
      batch_size: examples per step.
      scored: for each evaluation due at step `start`, the tasks that it scores.
      evaluates: whether the run repeats all evaluations of step `start`.
      config: the whole config, which names trackers; None: none.
      goodput: account of the run's time; None: none.

    Raises:
      UserError: a tracker cannot be opened.
    """
    self._steps, self._batch_size = steps, batch_size
    self.speed, self._goodput, self.costs = Speed(start, batch_size), goodput, None
    self._active = jax.process_index() == 0
    self._bar, self._trackers, self.overdue = None, None, frozenset()
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
    if config is not None:
      self._trackers = Trackers(Run(workdir, start, config, kept, keep), self.say)

  def say(self, line: str) -> None:
    """Prints a line for the user, above the progress bar."""
    if self._active:
      tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, flush=True)

  def compiled(self, costs, sampling) -> None:
    """Tells what the steps cost, a train.programs.Costs, for the kinds of a Sampling."""
    self.costs = costs
    self.speed.flops = lambda step: costs.flops[sampling.kind(step - 1)]
    self.say(str(costs))

  def train(self, step: int, numbers: dict[str, float]) -> None:
    """Logs metrics of a training step, and the speed since the last call or pause."""
    self._lap(step, soon=True)
    self.write(step, 'train', {**numbers, **self.speed.numbers()})
    if not self._active or self._bar is not None:
      return
    rate = self.speed.numbers()['examples_per_second']
    left = (self._steps - step) * self._batch_size / max(rate, 1e-9)
    self.say(f'step {step}/{self._steps}  {_summary(numbers)}  {rate:.0f} examples/s  '
             f'{left / 60:.1f} min left')

  def advance(self, step: int, numbers: dict[str, float]) -> None:
    """Moves the progress bar."""
    if self._bar is not None:
      self._bar.n = step
      rate = self.speed.numbers()['examples_per_second']
      self._bar.set_postfix_str(f'{_summary(numbers)}, {rate:.0f} examples/s')

  @contextlib.contextmanager
  def pause(self, step: int) -> Iterator[None]:
    """Excludes work after a step (compilation, an evaluation, saving) from speed and goodput."""
    self._lap(step)
    yield
    self.speed.resume()
    self._note(step)
    if self._bar is not None:
      self._bar.unpause()  # excludes it from the remaining time, too

  def _lap(self, step, soon=False):
    self.speed.lap(step)
    self._note(step, soon)

  def _note(self, step, soon=False):
    if self._goodput is not None:
      self._goodput.note(step, self.speed.seconds, soon=soon)

  def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
    """Writes metrics of one step to metrics.jsonl and the trackers.

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
    if self._trackers:
      self._trackers.add(step, split, numbers)

  def close(self) -> None:
    """Ends the progress bar and the trackers."""
    if self._bar is not None:
      self._bar.close()
    if self._trackers:
      self._trackers.close()
    self._note(self.speed.step)


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
