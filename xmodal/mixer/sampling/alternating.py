"""Towers or tasks take turns."""

from collections.abc import Mapping
import re

from xmodal.errors import UserError
from xmodal.mixer.sampling.sampling import SAMPLINGS, Sampling, StepKind
from xmodal.options import Option

OPTIONS = {
    'turns': Option((), 'Consecutive turns: pairs of a regular expression and a number of steps, '
                    "such as (('vision_tower', 100), ('text_tower|cross_modal|heads', "
                    '100)).'),
    'turns_of': Option('parameters', 'parameters: update only matching parameters; '
                       'tasks: train only matching tasks.',
                       choices=('parameters', 'tasks'))}


@SAMPLINGS.register('alternating', options=OPTIONS)
def alternating(sizes: Mapping[str, int], seed: int, turns: tuple, turns_of: str) -> Sampling:
  """Runs the turns in order, each for its number of steps."""
  del seed
  tasks, turns = tuple(sizes), tuple(turns)
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
    if turns_of == 'parameters':
      kinds.append(StepKind(tasks, pattern))
      continue
    found = tuple(task for task in tasks if re.fullmatch(pattern, task))
    if not found:
      raise UserError(f'config.mixer.turns: {pattern!r} matches none of config.mixer.tasks={tasks}')
    kinds.append(StepKind(found))
  if left_out := set(tasks).difference(*(kind.tasks for kind in kinds)):
    raise UserError(f'config.mixer.turns: {min(left_out)} has no turn; give it one, or remove it '
                    'from config.mixer.tasks')
  different = tuple(dict.fromkeys(kinds))
  return Sampling(different, tuple((different.index(kind), steps)
                                   for kind, (_, steps) in zip(kinds, turns)))


def _is_turn(turn):
  return (isinstance(turn, (tuple, list)) and list(map(type, turn)) == [str, int] and turn[1] > 0)
