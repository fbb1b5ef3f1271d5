"""Parameters that a kind of step does not update, parameters shared by tasks, data per step."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
import re

from flax import traverse_util

from xmodal.errors import UserError
from xmodal.mixer.feed import Feed
from xmodal.mixer.sampling.sampling import Sampling, StepKind


def resting(kind: StepKind, used: Mapping[str, Set[str]], params, frozen: Set[str]
            ) -> frozenset[str]:
  """Paths of the parameters that a kind of step does not update although other kinds do.

  Args:
    kind: kind of the step.
    used: paths of the parameters that each task uses; {}: the kind trains all tasks.
    params: all parameters, or their shapes.
    frozen: paths of the parameters that no step trains.

  Raises:
    UserError: the kind's pattern leaves no parameter to train.
  """
  trained = traverse_util.flatten_dict(params, sep='/').keys() - frozen
  moving = {name for name in trained if re.search(kind.updated, name)}
  if used:
    moving &= set().union(*(used[task] for task in kind.tasks))
  if not moving:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in trained})
    raise UserError(f'config.mixer.turns: {kind.updated!r} matches no parameter that is trained; '
                    'wanted a regular expression that matches paths, which begin with '
                    f'{", ".join(parts)}')
  return frozenset(trained - moving)


def shared(used: Mapping[str, Set[str]], frozen: Set[str]) -> frozenset[str]:
  """Paths of the trained parameters that two or more tasks use."""
  met, twice = set(), set()
  for names in used.values():
    twice |= met & names
    met |= names
  return frozenset(twice - frozen)


def never_updated(of_kinds: Mapping[StepKind, Set[str]]) -> Iterator[str]:
  """Yields a line if no kind of step updates some parameters."""
  if never := frozenset.intersection(*of_kinds.values()):
    yield (f'config.mixer.turns: none updates {len(never)} parameter arrays, such as {min(never)}: '
           'they keep their initial values')


def notes(feeds: Sequence[Feed], sampling: Sampling, train) -> Iterator[str]:
  """Yields lines on the number of epochs of each source.

  Only with several sources or kinds of steps, or with a batch larger than its source.
  """
  if 'train' not in feeds[0].sources:
    return
  for feed in feeds:
    steps, size = sampling.count_steps(feed.tasks, train.steps), len(feed.sources['train'])
    if len(feeds) == len(sampling.kinds) == 1 and size >= train.batch_size:
      continue
    times = steps * train.batch_size / size
    yield (f'{feed.name}: {steps:,} of {train.steps:,} steps read each of {size:,} training '
           f'examples {times:,.{1 if times < 100 else 0}f} times')


def of_steps(sampling: Sampling, tasks: Collection[str], step: int) -> dict[str, float]:
  """Share of the steps up to `step` that trained each task; {} if every step trains all tasks."""
  if len(tasks) == 1 or all(len(kind.tasks) == len(tasks) for kind in sampling.kinds):
    return {}
  return {f'{task}/share': sampling.count_steps((task,), step) / step for task in tasks}
