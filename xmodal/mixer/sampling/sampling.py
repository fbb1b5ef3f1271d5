"""Selects the tasks and parameters that a step trains; depends on (config, seed, step) only.

Steps form cycles of a fixed length. Each cycle has the same number of steps of each
kind; only their order differs. So the number of steps that a task had before step s is computed
directly, and resuming costs the same at any step.
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools

import numpy as np

from xmodal.data import order
from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.registry import Registry

# A sampling is a function (sizes, seed, **options) -> Sampling; see make_sampling.
SAMPLINGS = Registry('sampling', 'config.mixer.sampling', 'xmodal.mixer.sampling')

OPTIONS = {'sampling': Option('joint', 'Rule that selects the tasks of a step.')}


@dataclasses.dataclass(frozen=True)
class StepKind:
  """A kind of step.

  Attributes:
    tasks: names of the tasks it trains.
    updated: regular expression searched in parameter paths; matching ones are updated; '': all.
  """

  tasks: tuple[str, ...]
  updated: str = ''


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Assigns a kind to every step.

  Attributes:
    kinds: the distinct kinds.
    turns: (index of a kind, number of steps) pairs that make up a cycle.
    seed: seed of the shuffle of each cycle; None: the order of turns.
  """

  kinds: tuple[StepKind, ...]
  turns: tuple[tuple[int, int], ...]
  seed: int | None = None

  def kind(self, step: int) -> int:
    """Index of the kind of a step, counted from 0."""
    cycle, place = divmod(step, len(self._cycle))
    return int(self._order(cycle)[place])

  def count_steps(self, tasks: Collection[str], step: int) -> int:
    """Number of steps before `step` that train any of the given tasks."""
    has = np.array([not set(kind.tasks).isdisjoint(tasks) for kind in self.kinds])
    cycles, rest = divmod(step, len(self._cycle))
    return int(cycles * has[self._cycle].sum() + has[self._order(cycles)[:rest]].sum())

  def share(self, tasks: Collection[str]) -> float:
    """Share of all steps that train any of the given tasks, 0..1."""
    return self.count_steps(tasks, len(self._cycle)) / len(self._cycle)

  @functools.cached_property
  def _cycle(self):
    kinds, steps = zip(*self.turns)
    return np.repeat(kinds, steps)

  def _order(self, cycle):
    if self.seed is None:
      return self._cycle
    size = len(self._cycle)
    return self._cycle[order.permute(np.arange(size), size, self.seed, cycle)]


def make_sampling(config, sizes: Mapping[str, int]) -> Sampling:
  """Makes the sampling that config.mixer names.

  Args:
    config: the whole config.
    sizes: number of training examples by task, in the order of config.mixer.tasks.

  Raises:
    UserError: the sampling is unknown, or its options are invalid.
  """
  name, part = config.mixer.sampling, SAMPLINGS[config.mixer.sampling]
  for other in SAMPLINGS:
    for key, option in SAMPLINGS[other].options.items():
      if key not in part.options and config.mixer[key] != option.default:
        raise UserError(f'config.mixer.{key} means nothing to config.mixer.sampling={name!r}; '
                        f'leave it out, or take {other!r}')
  return part.make(dict(sizes), config.seed, **{key: config.mixer[key] for key in part.options})
