"""Texts that each mean one thing of a crowd, and the names that make them do so.

The places come first, then a text and the thing it shall mean, and only then
the names: who stands where the text could mean it too gets a name that the
text does not describe, and some who stand elsewhere get one that it does. So
where the meant one stands, and how it looks, says little by itself.
"""

from collections.abc import Sequence
import itertools
import math
import random
from typing import NamedTuple

from xmodal.data.scenes.questions import RELATIONS, direction
from xmodal.data.scenes.words import COLORS, SHAPES, Thing

FAMILIES = ('attributes', 'extreme', 'relation')

# The axis an extreme is about, and the sign that makes it the least on it.
EXTREMES = {'leftmost': (0, 1), 'rightmost': (0, -1), 'topmost': (1, 1), 'bottommost': (1, -1)}
# By which the next one is less extreme, with its centre and with its edge, in
# units of the picture's side.
EXTREME_MARGIN = 0.06
CLOSEST_MARGIN = 0.1  # Likewise for the next one's distance.
# What a description may name, from nothing to all three attributes.
KINDS = tuple(kind for number in range(4)
              for kind in itertools.combinations(Thing._fields, number))
MAX_RIVALS = 3  # Others that surely fit the description.
# Draws of one thing's name before the whole try is given up.
TRIES = 12


class Place(NamedTuple):
  """Where a thing stands: (x, y) and half its box's width, in units of the side."""

  size: str
  x: float
  y: float
  radius: float

  @property
  def center(self) -> tuple[float, float]:
    return self.x, self.y


class Expression(NamedTuple):
  """A text, its family, the index of the thing it means, and the names of all things."""

  text: str
  family: str
  target: int
  things: tuple[Thing, ...]


class _Frame(NamedTuple):
  """A text without its descriptions; `elsewhere` are those who may match the first."""

  words: str
  target: int
  elsewhere: Sequence[int] = ()
  anchor: int | None = None


def express(rng: random.Random, family: str, places: Sequence[Place],
            pairs: Sequence[tuple[str, str]]) -> Expression | None:
  """One try at naming the things at these places so that a text means one of them.

  Of an 'extreme' another thing always fits the description, and of a
  'relation' whenever there are three or more.

  Args:
    family: one of FAMILIES; of a single thing only 'attributes' can be said.
    pairs: the (color, shape) that things may have.

  Returns:
    None if it came to nothing; another try may do better.
  """
  kind = rng.choice(KINDS)
  frame = _FRAMES[family](rng, places, kind)
  # Few colors and shapes, so that things share words.
  colors = rng.sample(COLORS, rng.randint(2, len(COLORS)))
  shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
  palette = [(color, shape) for color, shape in pairs if color in colors and shape in shapes]
  if frame is None or not palette:
    return None
  target, anchor = frame.target, frame.anchor
  things = {target: Thing(places[target].size, *rng.choice(palette))}
  meant = things[target].keep(*kind)
  landmark = None
  if anchor is not None:
    things[anchor] = Thing(places[anchor].size, *rng.choice(palette))
    landmark = things[anchor].keep(*rng.choice(KINDS[1:]))
    if things[target].matches(landmark):
      return None
  rivals = [i for i in frame.elsewhere if 'size' not in kind or places[i].size == meant.size]
  if not rivals and family != 'attributes' and len(places) > len(things):
    return None
  rivals = rng.sample(rivals, min(len(rivals), rng.randint(1, MAX_RIVALS)))
  alike = [pair for pair in palette if Thing(meant.size, *pair).matches(meant)]
  for i, place in enumerate(places):
    if i in things:
      continue
    for _ in range(TRIES):
      thing = Thing(place.size, *rng.choice(alike if i in rivals else palette))
      if landmark and thing.matches(landmark):
        continue
      if i in frame.elsewhere or not thing.matches(meant):
        things[i] = thing
        break
    else:
      return None
  text = frame.words.format(_noun(meant), landmark and _noun(landmark))
  return Expression(text, family, target, tuple(things[i] for i in range(len(places))))


def _noun(description: Thing) -> str:
  """'small red thing'"""
  size, color, shape = description
  return ' '.join(word for word in (size, color, shape or 'thing') if word)


def _attributes(rng: random.Random, places: Sequence[Place], kind: tuple[str, ...]
                ) -> _Frame | None:
  return _Frame('the {}', rng.randrange(len(places))) if kind else None


def _extreme(rng: random.Random, places: Sequence[Place], kind: tuple[str, ...]
             ) -> _Frame | None:
  word, (axis, sign) = rng.choice(tuple(EXTREMES.items()))
  along = [sign * place.center[axis] for place in places]
  # Who is the first of all can be called so by no other name.
  target = rng.randrange(len(places)) if kind else along.index(min(along))
  here = along[target] + EXTREME_MARGIN
  edge = here - places[target].radius
  elsewhere = [i for i, place in enumerate(places)
               if along[i] > here and along[i] - place.radius > edge]
  return _Frame(f'the {word} {{}}', target, elsewhere)


def _relation(rng: random.Random, places: Sequence[Place], kind: tuple[str, ...]
              ) -> _Frame | None:
  target, anchor = rng.sample(range(len(places)), 2)
  others = [i for i in range(len(places)) if i not in (target, anchor)]
  center = places[anchor].center
  if rng.random() < 0.4:  # Half of all that come to something.
    far = [math.dist(place.center, center) for place in places]
    # Of a kind, who is left of another is nearly always the leftmost; but who is closest to it
    # cannot be told without looking there.
    here = far[target] + CLOSEST_MARGIN
    edge = here - places[target].radius
    elsewhere = [i for i in others if far[i] > here and far[i] - places[i].radius > edge]
    return _Frame('the {} closest to the {}', target, elsewhere, anchor)
  relation = direction(places[target].center, center)
  if relation is None:
    return None
  elsewhere = [i for i in others
               if direction(places[i].center, center) not in (relation, None)]
  return _Frame(f'the {{}} {RELATIONS[relation]} the {{}}', target, elsewhere, anchor)


_FRAMES = dict(zip(FAMILIES, (_attributes, _extreme, _relation)))
