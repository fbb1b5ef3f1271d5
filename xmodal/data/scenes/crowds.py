"""Embedded scenes for detection: up to ten overlapping shapes, and a text that refers to one.

As in shapes.py, generated from a seed, with a scene graph for every picture.
"""

from collections.abc import Sequence
import random

import numpy as np

from xmodal.data.example import Example, Object
from xmodal.data.scenes import expressions as shape_expressions
from xmodal.data.scenes import shapes
from xmodal.data.scenes.expressions import Expression, Place
from xmodal.data.scenes.words import COLORS, SHAPES, SIZES
from xmodal.errors import UserError

MAX_THINGS = 10
# Half the width of a box, in units of the picture's side.
RADIUS = {'small': (0.07, 0.085), 'large': (0.13, 0.16)}
# Least share of every shape that later shapes leave visible. It is measured on a grid
# of points, so it is slightly above the share guaranteed in pictures of 64 pixels: 0.6.
VISIBLE = 0.64
# Largest share of a box that later boxes may cover, checked before shapes are chosen.
BOX_COVERED = 0.5
# Tries for one place before all places are sampled anew, and for a text at these places.
TRIES = 20
NAMING_TRIES = 10
# Least number of (color, shape) pairs that `without` must leave; fewer allow few texts.
MIN_PAIRS = 12
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)

# Default side of a picture in pixels; _OUTLINE is for this side and scales with others.
_SIDE = 64
_OUTLINE = 1.0
_GRID = (np.arange(22, dtype=np.float32) + 0.5) / 11 - 1


class Crowds(shapes.Shapes):
  """A source of `size` scenes of 1 to 10 shapes with a referring expression, generated on access.

  Record i is a pure function of (seed, split, i, image_size, without), and the
  scene is the same at every image_size but for its scale. Shapes overlap, but
  at least 0.6 of each stays visible, and none leaves the picture. A box spans
  the whole shape, including hidden parts. `scene` gives shapes in drawing order.

  Args:
    split: 'train', 'val' or 'test'; their random streams are independent.
    size: number of records.
    image_size: side of the square picture in pixels, 32 or more. Designed for
      64, where small shapes are 9 to 11 pixels wide.
    seed: any integer; another seed gives another data set.
    without: names such as 'red circle' that no object has, so that no
      expression refers to one.

  Raises:
    UserError: for an unknown split or name, a size or image_size too small, or
      too many names left out.
  """

  def __init__(self, split: str, *, size: int, image_size: int = _SIDE, seed: int = 0,
               without: Sequence[str] = ()):
    super().__init__(split, size=size, image_size=image_size, seed=seed)
    self._pairs = pairs_without(without)

  def __getitem__(self, index: int) -> Example:
    """An Example with image, image_id, objects in random order, expression and its family.

    The family of the expression is the question_type.
    """
    index = range(self._size)[index]
    rng, found, scene = self._layout(index)
    objects = [Object(f'{o.color} {o.shape}', o.box) for o in scene.objects]
    expression = Object(found.text, objects[found.target].box)
    rng.shuffle(objects)  # The drawing order would reveal what lies on top.
    return Example(
        image=shapes.render(scene, rng, outline=_OUTLINE * self._image_size / _SIDE),
        image_id=index,
        objects=tuple(objects),
        expression=expression,
        question_type=found.family)

  def _layout(self, index: int) -> tuple[random.Random, Expression, shapes.Scene]:
    rng = random.Random(f'crowds/{self._seed}/{self._split}/{index}')
    number = rng.randint(1, MAX_THINGS)
    # Makes all families equally frequent, although a single thing allows only the first.
    family = rng.choices(shape_expressions.FAMILIES, (7, 10, 10) if number > 1 else (1, 0, 0))[0]
    places, found = lay_out(rng, number, family, self._pairs)
    side = self._image_size
    objects = tuple(
        shapes.SceneObject(thing.shape, thing.color, thing.size, (x * side, y * side),
                           ((x - r) * side, (y - r) * side, 2 * r * side, 2 * r * side))
        for thing, (_, x, y, r) in zip(found.things, places))
    return rng, found, shapes.Scene(objects, side)


def pairs_without(without: Sequence[str]) -> tuple[tuple[str, str], ...]:
  """All (color, shape) pairs except the named ones, such as 'red circle'.

  Raises:
    UserError: an unknown name, or too few pairs are left.
  """
  names = {f'{color} {shape}': (color, shape) for color, shape in PAIRS}
  for name in without:
    if name not in names:
      raise UserError(f'shapes: without has {name!r}, wanted a color and a shape such as '
                      f"'red circle' (colors {', '.join(COLORS)}; shapes {', '.join(SHAPES)})")
  pairs = tuple(pair for name, pair in names.items() if name not in without)
  if len(pairs) < MIN_PAIRS:
    raise UserError(f'shapes: without leaves {len(pairs)} of {len(PAIRS)} names, wanted at '
                    f'least {MIN_PAIRS}; leave out fewer')
  return pairs


def lay_out(rng: random.Random, number: int, family: str, pairs: Sequence[tuple[str, str]]
            ) -> tuple[list[Place], Expression]:
  """Samples places in drawing order, with names and an expression that fit them."""
  while True:
    places = _try_places(rng, number)
    for _ in range(NAMING_TRIES if places else 0):
      found = shape_expressions.express(rng, family, places, pairs)
      if found and _visible(places, found):
        return places, found


def _try_places(rng: random.Random, number: int) -> list[Place] | None:
  """`number` places whose boxes do not overlap too much, or None if none was found for one."""
  places, covered = [], []
  for _ in range(number):
    size = rng.choice(SIZES)
    radius = rng.uniform(*RADIUS[size])
    low, span = radius + shapes.BORDER, 1 - 2 * (radius + shapes.BORDER)
    for _ in range(TRIES):
      x, y = low + span * rng.random(), low + span * rng.random()
      now = []
      for (_, u, v, r), before in zip(places, covered):
        width = min(x + radius, u + r) - max(x - radius, u - r)
        height = min(y + radius, v + r) - max(y - radius, v - r)
        if width > 0 and height > 0:
          before += width * height / (4 * r * r)
          if before > BOX_COVERED:
            break
        now.append(before)
      else:
        places.append(Place(size, x, y, radius))
        covered = [*now, 0.0]
        break
    else:
      return None
  return places


def _visible(places: Sequence[Place], found: Expression) -> bool:
  """Whether later shapes leave enough of every shape visible."""
  for i, (_, x, y, radius) in enumerate(places):
    free = points = None
    for j in range(i + 1, len(places)):
      _, u, v, r = places[j]
      if abs(x - u) < radius + r and abs(y - v) < radius + r:
        if free is None:
          columns = _SIDE * (x + radius * _GRID)
          rows = _SIDE * (y + radius * _GRID)[:, None]
          free = points = _covers(found.things[i].shape, places[i], columns, rows)
        free = free & ~_covers(found.things[j].shape, places[j], columns, rows)
    if free is not None and np.count_nonzero(free) < VISIBLE * np.count_nonzero(points):
      return False
  return True


def _covers(shape: str, place: Place, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """bool [rows, columns]: whether each point of a grid, in pixels, lies in the shape."""
  return shapes.DEPTH[shape](abs(columns - _SIDE * place.x), rows - _SIDE * place.y,
                             _SIDE * place.radius) > 0
