"""Embedded scenes for text-to-image generation: one or two shapes, and a complete caption.

As in shapes.py, generated from a seed, with a scene graph for every picture.
"""

from collections.abc import Sequence
import random
import re
from typing import NamedTuple

from xmodal.data.example import Example, Object
from xmodal.data.scenes import crowds, shapes
from xmodal.data.scenes.words import COLORS, SHAPES, SIZES, Thing

RELATIONS = ('above', 'below', 'left of', 'right of')
# In units of the picture's side: half the width of a box, and the gap between two.
RADIUS = {'small': (0.11, 0.14), 'large': (0.19, 0.22)}
GAP = 0.08
# Largest offset across the axis of a relation, as a share of the offset along it.
ACROSS = 0.5
# Probability that a caption names the size of a thing.
_SIZE_PROBABILITY = 0.5

_THING = rf'an? (?:({"|".join(SIZES)}) )?({"|".join(COLORS)}) ({"|".join(SHAPES)})'
_CAPTION = re.compile(rf'{_THING}(?: ({"|".join(RELATIONS)}) {_THING})?')


class CaptionContent(NamedTuple):
  """The content of a caption: its things, and the relation of the first to the second.

  Attributes:
    things: one or two; size is None where the caption names none.
    relation: one of RELATIONS; '' for a single thing.
  """

  things: tuple[Thing, ...]
  relation: str = ''

  def __str__(self) -> str:
    first, *others = (f'a {thing}' for thing in self.things)
    return ' '.join((first, self.relation, *others)).strip()


def parse(caption: str) -> CaptionContent | None:
  """Parses a caption of these scenes; None for any other text."""
  found = _CAPTION.fullmatch(' '.join(caption.lower().split()).rstrip(' .'))
  if not found:
    return None
  *first, relation, size, color, shape = found.groups()
  second = (Thing(size, color, shape),) if relation else ()
  return CaptionContent((Thing(*first), *second), relation or '')


class Drawings(shapes.Shapes):
  """A source of `size` scenes of one or two shapes with a caption, generated on access.

  Record i is a pure function of (seed, split, i, image_size, without), and the
  scene is the same at every image_size but for its scale. Half of the scenes
  have one shape; half have two different ones, one clearly above, below, left or
  right of the other. A picture shows only what its caption names, without noise.

  Args:
    split: 'train', 'val' or 'test'; their random streams are independent.
    size: number of records.
    image_size: side of the square picture in pixels, 32 or more.
    seed: any integer; another seed gives another data set.
    without: names such as 'red circle' that no object has.

  Raises:
    UserError: for an unknown split or name, a size or image_size too small, or
      too many names left out.
  """

  def __init__(self, split: str, *, size: int, image_size: int = 32, seed: int = 0,
               without: Sequence[str] = ()):
    super().__init__(split, size=size, image_size=image_size, seed=seed)
    self._pairs = crowds.pairs_without(without)

  def __getitem__(self, index: int) -> Example:
    """An Example with image, image_id, one caption, and objects in the caption's order."""
    index = range(self._size)[index]
    rng, content, scene = self._layout(index)
    return Example(
        image=shapes.render(scene, rng, noise=False),
        image_id=index,
        captions=(str(content),),
        objects=tuple(Object(f'{o.color} {o.shape}', o.box) for o in scene.objects))

  def _layout(self, index: int) -> tuple[random.Random, CaptionContent, shapes.Scene]:
    rng = random.Random(f'drawings/{self._seed}/{self._split}/{index}')
    pairs = rng.sample(self._pairs, rng.choice((1, 2)))
    things = [Thing(rng.choice(SIZES), *pair) for pair in pairs]
    relation = rng.choice(RELATIONS) if len(things) == 2 else ''
    radii = [rng.uniform(*RADIUS[thing.size]) for thing in things]
    side = self._image_size
    objects = tuple(
        shapes.SceneObject(thing.shape, thing.color, thing.size, (x * side, y * side),
                           ((x - r) * side, (y - r) * side, 2 * r * side, 2 * r * side))
        for thing, r, (x, y) in zip(things, radii, _places(rng, radii, relation)))
    content = CaptionContent(
        tuple(thing if rng.random() < _SIZE_PROBABILITY else thing.keep('color', 'shape')
              for thing in things), relation)
    return rng, content, shapes.Scene(objects, side)


def _places(rng: random.Random, radii: Sequence[float], relation: str
            ) -> list[tuple[float, float]]:
  """Samples the centres (x, y) of one or two things of these radii, by rejection."""
  def draw(radius):
    low = radius + shapes.BORDER
    return rng.uniform(low, 1 - low)

  while True:
    places = [(draw(r), draw(r)) for r in radii]
    if not relation:
      return places
    (x, y), (u, v) = places
    along, across = (u - x, v - y) if relation in ('left of', 'right of') else (v - y, u - x)
    if relation in ('right of', 'below'):
      along = -along
    if along >= sum(radii) + GAP and abs(across) <= ACROSS * along:
      return places
