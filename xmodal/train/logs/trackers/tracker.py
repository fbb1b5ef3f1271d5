"""Trackers: TensorBoard, CSV files and experiment services, chosen by config.train.trackers.

A tracker is a function (run, **options) -> Tracker. It registers where it is defined, in a user's
plugin too, and imports its package when it is called:

    @TRACKERS.register('mlflow', package='mlflow')
    def open_mlflow(run): ...

The first process alone opens trackers. metrics.jsonl is always written, and holds all metrics.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import importlib.util
import os
from typing import Any, Protocol
import uuid

from xmodal import atomic
from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.registry import Registry

TRACKERS = Registry('tracker', 'config.train.trackers', 'xmodal.train.logs.trackers')

OPTIONS = {'trackers': Option(('tensorboard',), 'Where metrics go besides metrics.jsonl, such as '
                              "('tensorboard', 'wandb'); (): nowhere else.", may_change=True)}
# Of services that sort runs by project.
PROJECT = {'project': Option('xmodal', 'Project of the run at wandb and trackio.',
                             may_change=True)}
RUN_ID = 'run_id.txt'


class Tracker(Protocol):
  """Receives the metrics of a run."""

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """Adds the metrics of one step of a split ('train' or an evaluation), by name; NaN included."""

  def close(self) -> None:
    """Ends after the last metrics of this start of the run."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What trackers know of a run.

  Attributes:
    workdir: its folder on this machine.
    start: number of steps taken before.
    config: the whole config.
    lines: lines of metrics.jsonl from earlier starts that are still valid.
    keep: (step, split) -> whether metrics that an earlier start logged are still valid.
  """

  workdir: str
  start: int
  config: Any
  lines: Sequence[Mapping]
  keep: Callable[[int, str], bool]

  @functools.cached_property
  def id(self) -> str:
    """8 hexadecimal digits, kept in the workdir: the same in all starts of the run, and another
    for a run that begins again at step 0."""
    path = os.path.join(self.workdir, RUN_ID)
    if self.start and os.path.exists(path):
      with open(path, encoding='utf-8') as f:
        if found := f.read().strip():
          return found
    made = uuid.uuid4().hex[:8]
    with atomic.written(path) as f:
      f.write(f'{made}\n')
    return made

  @property
  def name(self) -> str:
    """Name for people: that of the folder, and the id."""
    return f'{os.path.basename(self.workdir)}-{self.id}'


def check(names: Sequence[str]) -> None:
  """Raises UserError if a tracker is unknown or its package is not installed."""
  for name in names:
    package = TRACKERS[name].facts.get('package')
    if package and importlib.util.find_spec(package) is None:
      raise UserError(f'config.train.trackers: {name!r} needs a package that is not installed: '
                      f'pip install {package}')


class Trackers:
  """The trackers of a run. One that fails during the run is named once and gets no more."""

  def __init__(self, run: Run, say: Callable[[str], None]):
    """Opens what run.config.train.trackers names.

    Raises:
      UserError: a tracker cannot be opened at the first start of the run. In a resumed run it is
        left out, since a network that is down must not keep the run from going on.
    """
    self._say, self._open = say, {}
    train = run.config.train
    for name in dict.fromkeys(train.trackers):
      part = TRACKERS[name]
      try:
        self._open[name] = part.make(run, **{key: train[key] for key in part.options})
      except Exception as error:  # packages of others may raise anything
        if not run.start:
          raise UserError(f'config.train.trackers: {name!r} cannot be opened '
                          f'({_line(error)}); leave it out, or repair that') from error
        self._drop(name, error)

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """See Tracker.add."""
    for name, tracker in list(self._open.items()):
      try:
        tracker.add(step, split, numbers)
      except Exception as error:
        del self._open[name]
        self._drop(name, error)

  def close(self) -> None:
    """Closes all."""
    for name, tracker in self._open.items():
      try:
        tracker.close()
      except Exception as error:
        self._drop(name, error)
    self._open = {}

  def _drop(self, name, error):
    self._say(f'the tracker {name!r} failed ({_line(error)}) and gets no more metrics of this '
              'start; metrics.jsonl has all')


def _line(error):
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
