"""Questions about scenes of shapes: the text, the answer and the things to draw.

A question is planned before its scene. Its family, filter, wording and answer
are sampled first, uniformly and independently, and then the things that make
the answer true. So the text of a question reveals nothing about its answer; a
comparison names two candidates in random order. For yes/no questions the scenes
of both answers also have the same distribution: swapping the thing in question
with a decoy turns one into the other.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import random

from xmodal.data.scenes.words import (
  NUMBERS,
  THINGS,
  VALUES,
  Center,
  Thing,
  amount,
  join,
  listing,
  plural,
)

MAX_THINGS = 4

# In units of the picture's side: least distance from the middle lines to an object
# named by its quadrant, and between two objects along the axis of their relation.
QUADRANT_MARGIN = 0.1
RELATION_MARGIN = 0.16
RELATIONS = {'left': 'left of', 'right': 'right of', 'above': 'above', 'below': 'below'}


@dataclasses.dataclass(frozen=True)
class QuestionScene:
  """A question, and the things in a scene that has its answer.

  Attributes:
    family: 'existence', 'count', 'color', 'shape', 'position', 'relation' or
      'comparison'.
    question: at most 14 English words.
    answer: one or two lower case words, or a digit.
    reason: one sentence that states the evidence.
    things: things to draw, 1 to MAX_THINGS.
    fits: whether centres (x, y) of the first things (one or more, in the order
      of `things`) are allowed; x to the right, y downwards, both in units of the
      picture's side.
  """

  family: str
  question: str
  answer: str
  reason: str
  things: tuple[Thing, ...]
  fits: Callable[[Sequence[Center]], bool] = lambda centers: True


def direction(first: Center, second: Center) -> str | None:
  """The relation (key of RELATIONS) of the first to the second; None if it is ambiguous."""
  dx, dy = first[0] - second[0], first[1] - second[1]
  if abs(dx) > max(RELATION_MARGIN, 1.6 * abs(dy)):
    return 'left' if dx < 0 else 'right'
  if abs(dy) > max(RELATION_MARGIN, 1.6 * abs(dx)):
    return 'above' if dy < 0 else 'below'
  return None


def plan(rng: random.Random) -> QuestionScene:
  """Samples a question; all families are equally frequent."""
  return rng.choice(FAMILIES)(rng)


def _existence(rng: random.Random) -> QuestionScene:
  kind = rng.choice([('color',), ('shape',), ('color', 'shape')])
  wording = rng.choice(['Is there a {}?', 'Do you see a {}?', 'Does the picture show a {}?'])
  wanted = rng.random() < 0.5
  number = rng.randint(1, MAX_THINGS)
  target = _draw(rng)
  decoy = _draw(rng, lambda t: all(getattr(t, k) != getattr(target, k) for k in kind))
  # With two attributes, the scenes of both answers show the same values in different
  # combinations, so that no attribute alone reveals the answer.
  crossed = [one._replace(**{kind[0]: getattr(two, kind[0])})
             for one, two in ((target, decoy), (decoy, target))]
  if len(kind) == 1:
    things = [target if wanted else decoy]
  elif number == 1:
    things = [target if wanted else rng.choice(crossed)]
  else:
    things = [target, decoy] if wanted else crossed
  corners = [t.keep(*kind) for t in (target, decoy, *crossed)]
  things += _fill(rng, number - len(things), lambda t: t.keep(*kind) not in corners)
  description = target.keep(*kind)
  found = [str(t) for t in things if t.matches(description)]
  reason = (f'There is a {found[0]}.' if found else
            f'There is no {description}, only {listing(t.keep(*kind) for t in things)}.')
  return QuestionScene('existence', wording.format(description), 'yes' if wanted else 'no', reason,
              tuple(things))


def _count(rng: random.Random) -> QuestionScene:
  kind = rng.choice([('color',), ('shape',), ('color', 'shape')])
  wording = rng.choice(['How many {} are there?', 'How many {} do you see?',
                        'What is the number of {}?'])
  wanted = rng.randrange(5)
  number = rng.randint(max(wanted, 1), MAX_THINGS)
  description = _draw(rng).keep(*kind)
  things = _fill(rng, wanted, lambda t: t.matches(description))
  # The others come from few kinds, so that they form groups that a question could also count.
  others = _fill(rng, 2, lambda t: not t.matches(description))
  if len(kind) == 2:
    half = description.keep(rng.choice(kind))
    others += _fill(rng, 1, lambda t: t.matches(half) and not t.matches(description))
  for _ in range(number - wanted):
    group = rng.choice(others).keep(*kind)
    things += _fill(rng, 1, lambda t: t.matches(group))
  return QuestionScene('count', wording.format(plural(description)), str(wanted),
              _count_reason(description, things[:wanted]), tuple(things))


def _count_reason(description: Thing, things: Sequence[Thing]) -> str:
  """'There are two circles: one red and one blue.'"""
  text = f'There {amount(len(things), description)}'
  detail = 'color' if description.color is None else 'shape'
  if not things or getattr(description, detail) is not None:
    return f'{text}.'
  if len(things) == 1:
    return f'{text}: a {things[0].keep("color", "shape")}.'
  groups = collections.Counter(getattr(t, detail) for t in things)
  words = [f'{NUMBERS[n]} {value if detail == "color" or n == 1 else plural(value)}'
           for value, n in groups.items()]
  return f'{text}: {join(words)}.'


def _color(rng: random.Random) -> QuestionScene:
  return _query(rng, 'color', 'shape', [
      'What color is the {}?', 'What is the color of the {}?', 'Which color does the {} have?'])


def _shape(rng: random.Random) -> QuestionScene:
  return _query(rng, 'shape', 'color', [
      'What shape is the {}?', 'What is the shape of the {}?', 'Which shape does the {} have?'])


def _query(rng: random.Random, attribute: str, named: str, wordings: list[str]) -> QuestionScene:
  """Asks for one attribute of the only thing with a given value of another attribute."""
  wording = rng.choice(wordings)
  target = _draw(rng)
  description = target.keep(named)
  # The other things show all other answers before repeating any.
  values = rng.sample(VALUES[attribute], len(VALUES[attribute]))
  values.remove(getattr(target, attribute))
  values += rng.choices(VALUES[attribute], k=MAX_THINGS)
  others = _fill(rng, rng.randint(0, MAX_THINGS - 1), lambda t: not t.matches(description))
  things = [target] + [t._replace(**{attribute: v}) for t, v in zip(others, values)]
  answer = getattr(target, attribute)
  reason = f'The {description} is {answer if attribute == "color" else "a " + answer}.'
  return QuestionScene(attribute, wording.format(description), answer, reason, tuple(things))


def _position(rng: random.Random) -> QuestionScene:
  kind = rng.choice([('color',), ('shape',), ('color', 'shape')])
  wording = rng.choice(['Where is the {}?', 'Which corner is the {} closest to?',
                        'Which quarter of the picture holds the {}?'])
  column, row = rng.randrange(2), rng.randrange(2)
  target = _draw(rng)
  description = target.keep(*kind)
  others = _fill(rng, rng.randint(0, MAX_THINGS - 1), lambda t: not t.matches(description))

  def fits(centers):
    x, y = centers[-1]
    inside = (x > 0.5, y > 0.5) == (column, row)
    if len(centers) == 1:
      return inside and min(abs(x - 0.5), abs(y - 0.5)) > QUADRANT_MARGIN
    return len(centers) > 2 or not inside

  answer = f'{("top", "bottom")[row]} {("left", "right")[column]}'
  return QuestionScene('position', wording.format(description), answer,
              f'The {description} is in the {answer}.', (target, *others), fits)


def _relation(rng: random.Random) -> QuestionScene:
  wording = rng.choice(['Where is the {} relative to the {}?',
                        'In which direction is the {} from the {}?',
                        'Where does the {} lie with respect to the {}?'])
  answer = rng.choice(tuple(RELATIONS))
  kind = rng.choice([('color',), ('shape',), ('color', 'shape')])
  things, first, second = _pair(rng, kind)

  def fits(centers):
    return len(centers) != 2 or direction(*centers) == answer

  return QuestionScene('relation', wording.format(first, second), answer,
              f'The {first} is {RELATIONS[answer]} the {second}.', things, fits)


def _comparison(rng: random.Random) -> QuestionScene:
  return rng.choice([_compare_numbers, _compare_sizes])(rng, rng.choice(['color', 'shape']))


def _compare_numbers(rng: random.Random, attribute: str) -> QuestionScene:
  wording = rng.choice(['Which {} is there more of, {} or {}?',
                        'Which {} is more frequent, {} or {}?'])
  less = rng.randint(0, MAX_THINGS // 2 - 1)
  more = rng.randint(less + 1, MAX_THINGS - less)
  values = rng.sample(VALUES[attribute], 2)
  winner, loser = (Thing(None, None, None)._replace(**{attribute: value}) for value in values)
  things = [t for description, n in ((winner, more), (loser, less))
            for t in _fill(rng, n, lambda t: t.matches(description))]
  things += _fill(rng, rng.randint(0, MAX_THINGS - len(things)),
                  lambda t: not (t.matches(winner) or t.matches(loser)))
  answer = values[0]
  rng.shuffle(values)
  reason = f'There {amount(more, winner)} and {NUMBERS[less]} ' + (
      f'{loser}.' if less == 1 else f'{plural(loser)}.')
  return QuestionScene('comparison', wording.format(attribute, *values), answer, reason,
                       tuple(things))


def _compare_sizes(rng: random.Random, attribute: str) -> QuestionScene:
  wording = rng.choice(['Which is larger, the {} or the {}?',
                        'Which one is larger, the {} or the {}?'])
  (one, two, *others), first, second = _pair(rng, (attribute,))
  things = (one._replace(size='large'), two._replace(size='small'), *others)
  pair = [first, second]
  rng.shuffle(pair)
  return QuestionScene('comparison', wording.format(*pair), getattr(first, attribute),
              f'The {first} is large and the {second} is small.', things)


FAMILIES = (_existence, _count, _color, _shape, _position, _relation, _comparison)


def _draw(rng: random.Random, allowed: Callable[[Thing], bool] = lambda t: True) -> Thing:
  while True:
    thing = rng.choice(THINGS)
    if allowed(thing):
      return thing


def _fill(rng: random.Random, number: int, allowed: Callable[[Thing], bool]) -> list[Thing]:
  return [_draw(rng, allowed) for _ in range(number)]


def _pair(rng: random.Random, kind: Sequence[str]) -> tuple[tuple[Thing, ...], Thing, Thing]:
  """(things, first description, second description); each fits only the first or second thing."""
  one = _draw(rng)
  first = one.keep(*kind)
  two = _draw(rng, lambda t: not t.matches(first))
  second = two.keep(*kind)
  others = _fill(rng, rng.randint(0, MAX_THINGS - 2),
                 lambda t: not (t.matches(first) or t.matches(second)))
  return (one, two, *others), first, second
