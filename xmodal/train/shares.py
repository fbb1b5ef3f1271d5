"""What each kind of step leaves alone, what tasks share, how much of the data each step reads."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
import re

from flax import traverse_util

from xmodal.errors import UserError
from xmodal.mixer.feed import Feed
from xmodal.mixer.sampling.sampling import Kind, Sampling


def resting(kind: Kind, used: Mapping[str, Set[str]], params, frozen: Set[str]) -> frozenset[str]:
  """Paths of the parameters that a kind of step leaves alone though others train them.

  Args:
    kind: of the step.
    used: paths of the parameters that each task uses; {} where there is one task.
    params: all parameters, or their shapes.
    frozen: those that no step trains.

  Raises:
    UserError: its pattern leaves nothing to train.
  """
  trained = traverse_util.flatten_dict(params, sep='/').keys() - frozen
  moving = {name for name in trained if re.search(kind.updated, name)}
  if used:
    moving &= set().union(*(used[task] for task in kind.tasks))
  if not moving:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in trained})
    raise UserError(f'config.mixer.turns: {kind.updated!r} matches no parameter that is trained; '
                    'wanted a regular expression found in paths, which begin with '
                    f'{", ".join(parts)}')
  return frozenset(trained - moving)


def shared(used: Mapping[str, Set[str]], frozen: Set[str]) -> frozenset[str]:
  """Paths of the trained parameters that two tasks or more use."""
  met, twice = set(), set()
  for names in used.values():
    twice |= met & names
    met |= names
  return frozenset(twice - frozen)


def never_updated(of_kinds: Mapping[Kind, Set[str]]) -> Iterator[str]:
  """A line on the parameters that rest in every kind of step."""
  if never := frozenset.intersection(*of_kinds.values()):
    yield (f'config.mixer.turns: none updates {len(never)} parameter arrays, such as {min(never)}: '
           'they stay as they begin')


def notes(feeds: Sequence[Feed], sampling: Sampling, train) -> Iterator[str]:
  """A line on how often each source is read, where there are several, or steps differ, or a batch
  is larger than its source."""
  if 'train' not in feeds[0].sources:
    return
  for feed in feeds:
    steps, size = sampling.taken(feed.tasks, train.steps), len(feed.sources['train'])
    if len(feeds) == len(sampling.kinds) == 1 and size >= train.batch_size:
      continue
    yield (f'{feed.name}: {steps:,} of {train.steps:,} steps read {train.batch_size} of {size:,} '
           f'examples, {steps * train.batch_size / size:,.1f} epochs')


def of_steps(sampling: Sampling, tasks: Collection[str], step: int) -> dict[str, float]:
  """Share of the steps up to `step` that trained each task, where some do not train all."""
  if len(tasks) == 1 or all(len(kind.tasks) == len(tasks) for kind in sampling.kinds):
    return {}
  return {f'{task}/share': sampling.taken((task,), step) / step for task in tasks}
