"""Words for the shapes of the embedded data set, singular and plural."""

import collections
from collections.abc import Iterable, Sequence
import random
from typing import NamedTuple

SIZES = ('small', 'large')
COLORS = ('red', 'green', 'blue', 'yellow', 'purple', 'cyan')
SHAPES = ('circle', 'square', 'triangle', 'cross')
VALUES = {'size': SIZES, 'color': COLORS, 'shape': SHAPES}
# (x, y), x to the right and y downwards, in any unit.
Center = tuple[float, float]
NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six')


class Thing(NamedTuple):
  """The attributes of an object, or a description of objects, where None means any."""

  size: str | None
  color: str | None
  shape: str | None

  def matches(self, description: 'Thing') -> bool:
    return all(want is None or have == want for have, want in zip(self, description))

  def keep(self, *attributes: str) -> 'Thing':
    """The description with only these attributes."""
    return Thing(*(value if name in attributes else None
                   for name, value in zip(self._fields, self)))

  def __str__(self) -> str:
    return ' '.join(word for word in (self.size, self.color, self.shape or 'object') if word)


THINGS = tuple(Thing(size, color, shape)
               for size in SIZES for color in COLORS for shape in SHAPES)


def plural(noun: Thing | str) -> str:
  text = str(noun)
  return text + ('es' if text.endswith('s') else 's')


def amount(number: int, noun: Thing) -> str:
  """'is one circle', 'are two circles', 'are no circles'"""
  return f'is one {noun}' if number == 1 else f'are {NUMBERS[number]} {plural(noun)}'


def listing(things: Iterable[Thing]) -> str:
  """'a red circle and two small blue squares'"""
  return join([f'a {thing}' if n == 1 else f'{NUMBERS[n]} {plural(thing)}'
               for thing, n in collections.Counter(things).items()])


def join(words: list[str]) -> str:
  """'one', 'one and two', 'one, two and three'"""
  return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))


def caption(rng: random.Random, things: Sequence[Thing], centers: Sequence[Center]) -> str:
  """Names every thing and, if there are two or more, the relation of two of them."""
  text = f'{listing(things)}.'.capitalize()
  if len(things) == 1:
    return text
  first, second = rng.sample(range(len(things)), 2)
  names = [thing.keep('color', 'shape') for thing in things]
  articles = ['the' if names.count(names[k]) == 1 else 'a' for k in (first, second)]
  if names[first] == names[second]:
    articles[1] = 'another'
  dx, dy = (a - b for a, b in zip(centers[first], centers[second]))
  if abs(dx) > abs(dy):  # Boxes do not overlap, so this axis clearly separates the two.
    relation = 'left of' if dx < 0 else 'right of'
  else:
    relation = 'above' if dy < 0 else 'below'
  return (f'{text} {articles[0].capitalize()} {names[first]} is {relation} '
          f'{articles[1]} {names[second]}.')
