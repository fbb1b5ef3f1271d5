"""The embedded data set: coloured shapes generated from a seed, with questions.

It needs no files. The question, the caption and the boxes come from the scene
graph of each picture, which is also available by itself (Shapes.scene).
"""

from collections.abc import Mapping
import dataclasses
import math
import random

import numpy as np

from xmodal.data.example import Example, Object
from xmodal.data.scenes import questions as shape_questions
from xmodal.data.scenes import words as shape_words
from xmodal.errors import UserError

SPLITS = ('train', 'val', 'test')
MIN_IMAGE_SIZE = 32

# In units of the picture's side: half the width of a box, and the gaps between two
# boxes and between a box and the border.
RADIUS = {'small': (0.08, 0.09), 'large': (0.135, 0.15)}
GAP = 0.042  # Two pixels of 48.
BORDER = 0.015
# Tries to place one object before the whole layout is sampled anew.
TRIES = 20

# 0..255, with a margin for tint, jitter and noise (-8 to 7), so that nothing clips.
RGB = {
    'red': (215, 45, 45), 'green': (40, 165, 60), 'blue': (45, 75, 225),
    'yellow': (230, 200, 40), 'purple': (155, 60, 190), 'cyan': (45, 200, 215)}
BACKGROUND = ((25, 60), (195, 235))
TINT = 10.0
COLOR_JITTER = 15.0
OUTLINE = 0.55  # Brightness of an outline, relative to the shape's color.


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """One shape: its attributes, and its position in pixels (x right, y down).

  Attributes:
    shape, color, size: words of shape_words.SHAPES, COLORS and SIZES.
    center: (x, y), the centre of the box.
    box: (x, y, width, height), tight around the shape.
  """

  shape: str
  color: str
  size: str
  center: tuple[float, float]
  box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
  """The objects of a picture of [image_size, image_size] pixels, in drawing order."""

  objects: tuple[SceneObject, ...]
  image_size: int


class Shapes:
  """A source of `size` scenes, each with one question, generated on access.

  Record i is a pure function of (seed, split, i, image_size), and the scene
  is the same at every image_size but for its scale. Scenes hold 1 to 4
  shapes in 6 colors and 2 sizes that neither touch nor leave the picture.

  Args:
    split: 'train', 'val' or 'test'; their random streams are independent.
    size: number of records.
    image_size: side of the square picture in pixels, 32 or more.
    seed: any integer; another seed gives another data set.

  Raises:
    UserError: for an unknown split, or a size or image_size too small.
  """

  def __init__(self, split: str, *, size: int, image_size: int = 48, seed: int = 0):
    if split not in SPLITS:
      raise UserError(f"shapes: split is '{split}', wanted one of {', '.join(SPLITS)}")
    if size < 1:
      raise UserError(f'shapes: size is {size}, wanted at least 1 record')
    if image_size < MIN_IMAGE_SIZE:
      raise UserError(f'shapes: image_size is {image_size}, wanted at least {MIN_IMAGE_SIZE} '
                      'pixels, because smaller shapes look alike')
    self._split, self._size, self._image_size, self._seed = split, size, image_size, seed

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Example:
    """An Example with question, answer, caption, objects (named 'red circle') and reason."""
    index = range(self._size)[index]
    rng, plan, scene = self._layout(index)
    things = [shape_words.Thing(o.size, o.color, o.shape) for o in scene.objects]
    return Example(
        image=render(scene, rng),
        question=plan.question,
        answers=(plan.answer,),
        question_id=index,
        question_type=plan.family,
        captions=(shape_words.caption(rng, things, [o.center for o in scene.objects]),),
        objects=tuple(Object(f'{o.color} {o.shape}', o.box) for o in scene.objects),
        reason=plan.reason)

  def scene(self, index: int) -> Scene:
    """The scene graph of record `index`, without drawing it."""
    return self._layout(range(self._size)[index])[2]

  def _layout(self, index: int) -> tuple[random.Random, shape_questions.QuestionScene, Scene]:
    # Python's generator hashes the whole seed text, equally in every process, and
    # initialises in a third of the time of numpy's.
    rng = random.Random(f'shapes/{self._seed}/{self._split}/{index}')
    plan = shape_questions.plan(rng)
    return rng, plan, lay_out(rng, plan, self._image_size)


def lay_out(rng: random.Random, plan: shape_questions.QuestionScene, image_size: int,
            radius: Mapping[str, tuple[float, float]] = RADIUS) -> Scene:
  """Places every thing of the plan, by rejection sampling.

  radius: size -> range of half the box's width, in units of the picture's side.
  """
  while (places := _try_places(rng, plan, radius)) is None:
    pass
  objects = []
  for thing, (x, y, r) in zip(plan.things, places):
    x, y, r = x * image_size, y * image_size, r * image_size
    objects.append(SceneObject(thing.shape, thing.color, thing.size, (x, y),
                               (x - r, y - r, 2 * r, 2 * r)))
  rng.shuffle(objects)  # The plan's order would reveal the thing in question.
  return Scene(tuple(objects), image_size)


def _try_places(rng: random.Random, plan: shape_questions.QuestionScene,
                radii: Mapping[str, tuple[float, float]]
                ) -> list[tuple[float, float, float]] | None:
  """[(x, y, radius)] in units of the picture's side, or None if a thing could not be placed."""
  places, centers = [], []
  for thing in plan.things:
    radius = rng.uniform(*radii[thing.size])
    low, span = radius + BORDER, 1 - 2 * (radius + BORDER)
    for _ in range(TRIES):
      x, y = low + span * rng.random(), low + span * rng.random()
      for u, v, r in places:
        apart = radius + r + GAP
        if abs(x - u) < apart and abs(y - v) < apart:
          break
      else:
        centers.append((x, y))
        if plan.fits(centers):
          places.append((x, y, radius))
          break
        centers.pop()
    else:
      return None
  return places


def render(scene: Scene, rng: random.Random, *, outline: float = 0.0,
           noise: bool = True) -> np.ndarray:
  """Draws the scene as uint8 [S, S, 3], edges antialiased, with slight noise.

  Args:
    outline: width in pixels of a darker rim inside every shape's edge; 0: none.
    noise: whether to add noise.
  """
  side = scene.image_size
  level = rng.uniform(*rng.choice(BACKGROUND))
  background = np.array([level + rng.uniform(-TINT, TINT) for _ in range(3)], np.float32)
  pixels = np.empty((side, side, 3), np.float32)
  pixels[:] = np.tile(background, (side, 1))  # By rows: copying 3 values at a time is slow.
  middles = np.arange(0.5, side, dtype=np.float32)
  for thing in scene.objects:
    (x, y), radius = thing.center, thing.box[2] / 2
    rows = slice(int(y - radius), math.ceil(y + radius))
    columns = slice(int(x - radius), math.ceil(x + radius))
    depth = DEPTH[thing.shape](abs(middles[columns] - x), middles[rows, None] - y, radius)
    coverage = np.minimum(np.maximum(depth + 0.5, 0), 1)[..., None]
    color = np.array([c + rng.uniform(-COLOR_JITTER, COLOR_JITTER) for c in RGB[thing.color]],
                     np.float32)
    if outline:
      fill = np.minimum(np.maximum(depth + 0.5 - outline, 0), 1)[..., None]
      color = color * (OUTLINE + (1 - OUTLINE) * fill)
    window = pixels[rows, columns]
    window += coverage * (color - window)
  if noise:
    pixels += (np.frombuffer(rng.randbytes(pixels.size), np.int8) >> 4).reshape(pixels.shape)
  return pixels.astype(np.uint8)


def _circle(x, y, radius):
  return radius - np.sqrt(x * x + y * y)


def _square(x, y, radius):
  return radius - np.maximum(x, abs(y))


def _triangle(x, y, radius):
  # Apex on top. Its two sides are moved out by half a pixel and clipped to the
  # box; otherwise the tip would fade.
  return np.minimum(_square(x, y, radius), (y + radius + 1 - 2 * x) / math.sqrt(5))


def _cross(x, y, radius):
  y, arm = abs(y), 0.36 * radius
  return np.maximum(np.minimum(radius - x, arm - y), np.minimum(arm - x, radius - y))


# Signed distance in pixels to the shape's edge, positive inside, of points at offsets
# |x| and y from the centre.
DEPTH = {'circle': _circle, 'square': _square, 'triangle': _triangle, 'cross': _cross}
