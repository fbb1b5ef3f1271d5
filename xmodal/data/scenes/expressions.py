"""Referring expressions for one thing of a crowd, and names that make them unambiguous.

Places are sampled first, then a text and its target, and the names last. A thing
at a place that the text also fits gets a name that the text does not describe;
some things at other places get a name that it does. So neither the target's place
nor its look alone identifies it.
"""

from collections.abc import Sequence
import itertools
import math
import random
from typing import NamedTuple

from xmodal.data.scenes.questions import RELATIONS, direction
from xmodal.data.scenes.words import COLORS, SHAPES, Thing

FAMILIES = ('attributes', 'extreme', 'relation')

# Extreme -> its axis (0: x, 1: y), and the sign with which the extreme is the minimum.
EXTREMES = {'leftmost': (0, 1), 'rightmost': (0, -1), 'topmost': (1, 1), 'bottommost': (1, -1)}
# Least distance, of centres and of edges, from the extreme to the next thing that
# fits the description, in units of the picture's side.
EXTREME_MARGIN = 0.06
CLOSEST_MARGIN = 0.1  # The same for distances to the anchor.
# Attributes that a description may name, from none to all three.
KINDS = tuple(kind for number in range(4)
              for kind in itertools.combinations(Thing._fields, number))
MAX_RIVALS = 3  # Most other things that are made to fit the description.
# Samples of one thing's name before the whole try fails.
TRIES = 12


class Place(NamedTuple):
  """Centre (x, y) of a thing and half the width of its box, in units of the picture's side."""

  size: str
  x: float
  y: float
  radius: float

  @property
  def center(self) -> tuple[float, float]:
    return self.x, self.y


class Expression(NamedTuple):
  """A text, its family, the index of the thing it refers to, and the names of all things."""

  text: str
  family: str
  target: int
  things: tuple[Thing, ...]


class _Frame(NamedTuple):
  """A text without its descriptions; things in `elsewhere` may match the first description."""

  words: str
  target: int
  elsewhere: Sequence[int] = ()
  anchor: int | None = None


def express(rng: random.Random, family: str, places: Sequence[Place],
            pairs: Sequence[tuple[str, str]]) -> Expression | None:
  """Tries to name the things at these places so that a text refers to exactly one of them.

  For an 'extreme' another thing always fits the description; for a 'relation',
  whenever there are three or more things.

  Args:
    family: one of FAMILIES; a single thing allows only 'attributes'.
    pairs: the (color, shape) that things may have.

  Returns:
    None if the try failed; another may succeed.
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
  # Without a description, the target must be the extreme of all things.
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
  if rng.random() < 0.4:  # Half of all successful tries.
    far = [math.dist(place.center, center) for place in places]
    # A thing left of another is nearly always the leftmost of its kind; the closest one can
    # only be found by looking at the anchor.
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
