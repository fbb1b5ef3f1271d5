"""Which tasks a step trains, and which parameters: a function of (config, seed, step) only.

Steps come in cycles of a fixed length, in which each kind of step has its exact
number; only their order differs from cycle to cycle. So how many steps a task
has had before any step is counted in one go, and a run goes on from step s at
the same cost for any s.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import functools
import re

import numpy as np

from xmodal.data import order
from xmodal.errors import UserError

SAMPLINGS = ('joint', 'proportional', 'temperature', 'round_robin', 'alternating')
# Steps of a cycle of proportional and temperature: shares are rounded to whole per cents.
_CYCLE = 100


@dataclasses.dataclass(frozen=True)
class Kind:
  """What one kind of step trains.

  Attributes:
    tasks: names of the tasks whose losses it has.
    updated: regular expression found in the paths of the parameters that it changes; '': all.
  """

  tasks: tuple[str, ...]
  updated: str = ''


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The kind of every step.

  Attributes:
    kinds: the different kinds.
    turns: (index of a kind, number of steps) in the order of a cycle.
    seed: of the order of a cycle's steps, another one in each cycle; None: as in turns.
  """

  kinds: tuple[Kind, ...]
  turns: tuple[tuple[int, int], ...]
  seed: int | None = None

  def kind(self, step: int) -> int:
    """Index of the kind of a step, counted from 0."""
    cycle, place = divmod(step, len(self._cycle))
    return int(self._order(cycle)[place])

  def taken(self, tasks: Collection[str], step: int) -> int:
    """How many of the steps before `step` train any of some tasks."""
    has = np.array([not set(kind.tasks).isdisjoint(tasks) for kind in self.kinds])
    cycles, rest = divmod(step, len(self._cycle))
    return int(cycles * has[self._cycle].sum() + has[self._order(cycles)[:rest]].sum())

  def share(self, tasks: Collection[str]) -> float:
    """Share of all steps that train any of some tasks, 0..1."""
    return self.taken(tasks, len(self._cycle)) / len(self._cycle)

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
  """The sampling of config.mixer.

  Args:
    config: the whole config.
    sizes: examples to train on, by task, in the order of config.mixer.tasks.

  Raises:
    UserError: no such sampling, or turns that cannot be.
  """
  mixer, tasks = config.mixer, tuple(sizes)
  if mixer.sampling not in SAMPLINGS:
    raise UserError(f'config.mixer.sampling={mixer.sampling!r}: wanted one of '
                    f'{", ".join(SAMPLINGS)}')
  if mixer.turns and mixer.sampling != 'alternating':
    raise UserError(f'config.mixer.turns mean nothing to config.mixer.sampling={mixer.sampling!r}; '
                    "leave them out, or set it to 'alternating'")
  if mixer.turns_of not in ('parameters', 'tasks'):
    raise UserError(f'config.mixer.turns_of={mixer.turns_of!r}: wanted parameters or tasks')
  if mixer.sampling == 'joint':
    return Sampling((Kind(tasks),), ((0, 1),))
  if mixer.sampling == 'alternating':
    return _alternating(mixer, tasks)
  kinds = tuple(Kind((task,)) for task in tasks)
  if mixer.sampling == 'round_robin':
    return Sampling(kinds, tuple((i, 1) for i in range(len(tasks))))
  temperature = mixer.temperature if mixer.sampling == 'temperature' else 1.0
  counts = apportion([size ** (1 / temperature) for size in sizes.values()],
                     max(_CYCLE, len(tasks)))
  return Sampling(kinds, tuple(enumerate(counts)), config.seed)


def apportion(amounts: Sequence[float], total: int) -> list[int]:
  """Whole numbers that add up to total, in proportion to amounts, each at least 1.

  By largest remainders (Hamilton's method); what the smallest are given above their due is
  taken from those who have most above theirs.
  """
  due = np.asarray(amounts, float) / np.sum(amounts) * total
  counts = np.maximum(np.floor(due).astype(int), 1)
  while counts.sum() < total:
    counts[np.argmax(due - counts)] += 1
  while counts.sum() > total:
    counts[np.argmax(np.where(counts > 1, counts - due, -np.inf))] -= 1
  return counts.tolist()


def _is_turn(turn):
  return (isinstance(turn, (tuple, list)) and list(map(type, turn)) == [str, int] and turn[1] > 0)


def _alternating(mixer, tasks):
  """Each turn of config.mixer.turns, in order, for its number of steps."""
  turns = tuple(mixer.turns)
  if not turns or not all(map(_is_turn, turns)):
    raise UserError(f'config.mixer.turns={turns}: wanted pairs of a regular expression and a '
                    "number of steps, such as (('vision_tower', 100), ('text_tower|heads', 50))")
  kinds = []
  for pattern, _ in turns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f'config.mixer.turns: {pattern!r} is no regular expression ({error})'
                      ) from error
    if mixer.turns_of == 'parameters':
      kinds.append(Kind(tasks, pattern))
      continue
    found = tuple(task for task in tasks if re.fullmatch(pattern, task))
    if not found:
      raise UserError(f'config.mixer.turns: {pattern!r} is none of config.mixer.tasks={tasks}')
    kinds.append(Kind(found))
  if left_out := set(tasks).difference(*(kind.tasks for kind in kinds)):
    raise UserError(f'config.mixer.turns: {min(left_out)} has no turn; give it one, or take it out '
                    'of config.mixer.tasks')
  different = tuple(dict.fromkeys(kinds))
  return Sampling(different, tuple((different.index(kind), steps)
                                   for kind, (_, steps) in zip(kinds, turns)))
