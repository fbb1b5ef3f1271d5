"""Judges from pixels alone whether a picture of the embedded scenes matches its caption.

It uses no model. Pixels that differ from the background form connected parts. Each part gets the
nearest named colour, and the shape that overlaps it most when drawn at the best place and size.
"""

import collections
from collections.abc import Mapping, Sequence
import itertools
from typing import NamedTuple

import cv2
import numpy as np

from xmodal.data.scenes.drawings import CaptionContent
from xmodal.data.scenes.shapes import DEPTH, RGB
from xmodal.data.scenes.words import COLORS, SHAPES, Thing

# Colour distances (0..255): least distance of a thing from the background, and largest distance
# of a thing from its named colour.
_BACKGROUND_DISTANCE, _COLOR_DISTANCE = 45.0, 70.0
# Least share of a part's pixels that must have one colour.
_ONE_COLOR = 0.85
# Least IoU of a drawn shape and a part.
_LEAST_OVERLAP = 0.78
# Smaller parts, as a share of the picture's area, are specks and not things.
_SPECK = 0.006
# Half width, as a share of the picture's side, above which a thing is large.
_LARGE = 0.165
_TURNS = np.array(list(itertools.product((-1, 0, 1), repeat=3)), np.float32)


class Seen(NamedTuple):
  """A thing that a picture shows.

  Attributes:
    thing: its size, color and shape; None for a color or shape that no word names.
    center: (x, y) in pixels.
    overlap: IoU of the shape and the thing, 0..1.
  """

  thing: Thing
  center: tuple[float, float]
  overlap: float


def look(pixels: np.ndarray) -> list[Seen]:
  """The things in a picture, uint8 [S, S, 3], the largest first."""
  picture = pixels.astype(np.float32)
  border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
  background = np.median(border, axis=0)
  foreground = np.linalg.norm(picture - background, axis=-1) > _BACKGROUND_DISTANCE
  count, labels, stats, _ = cv2.connectedComponentsWithStats(
      foreground.astype(np.uint8), connectivity=4)
  least = _SPECK * labels.size
  parts = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= least]
  parts.sort(key=lambda i: -stats[i, cv2.CC_STAT_AREA])
  return [_measure(picture, background, labels, i) for i in parts]


def _measure(picture, background, labels, number):
  own = labels == number
  distance = np.where(own, np.linalg.norm(picture - background, axis=-1), 0)
  core = picture[distance > 0.75 * np.quantile(distance[own], 0.9)]
  color = np.median(core, axis=0)
  away = color - background
  coverage = np.clip((picture - background) @ away / max(away @ away, 1.0), 0, 1)
  # Its faint rim is part of it; other things are not.
  near = cv2.dilate(own.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
  coverage = np.where(near & ((labels == 0) | own), coverage, 0).astype(np.float32)
  names = {name: float(np.linalg.norm(color - RGB[name])) for name in COLORS}
  name = min(names, key=names.get)
  of_it = (np.linalg.norm(core - color, axis=-1) < _COLOR_DISTANCE).mean()
  fits = {shape: _fit(coverage, shape) for shape in SHAPES}
  shape = max(fits, key=lambda s: fits[s][0])
  overlap, (x, y, radius) = fits[shape]
  size = 'large' if radius > _LARGE * len(labels) else 'small'
  thing = Thing(size, name if names[name] <= _COLOR_DISTANCE and of_it >= _ONE_COLOR else None,
                shape if overlap >= _LEAST_OVERLAP else None)
  return Seen(thing, (x, y), overlap)


def _fit(coverage, shape):
  """(overlap, (x, y, radius)) of a shape at its best position and size."""
  rows, columns = (np.flatnonzero((coverage > 0.5).any(axis)) for axis in (1, 0))
  if not len(rows):
    return 0.0, (0.0, 0.0, 0.0)
  low, high = ((max(p[0] - 2, 0), min(p[-1] + 3, len(coverage))) for p in (columns, rows))
  window = coverage[high[0]:high[1], low[0]:low[1]]
  x_at, y_at = (np.arange(*span, dtype=np.float32) + 0.5 for span in (low, high))
  best = np.array([(columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2,
                   max(np.ptp(columns), np.ptp(rows)) / 2 + 0.5], np.float32)
  overlap = 0.0
  for step in (0.5, 0.5, 0.25):
    tried = best + step * _TURNS
    x, y, radius = (tried[:, i, None, None] for i in range(3))
    drawn = np.clip(DEPTH[shape](abs(x_at - x), y_at[:, None] - y, radius) + 0.5, 0, 1)
    common, either = (f(drawn, window).sum((1, 2)) for f in (np.minimum, np.maximum))
    shares = common / either
    best, overlap = tried[shares.argmax()], float(shares.max())
  return overlap, tuple(map(float, best))


def fault(pixels: np.ndarray, content: CaptionContent) -> str:
  """How a picture, uint8 [S, S, 3], differs from its caption; '' if it matches.

  It must show the things in the caption and no others, in the sizes stated, with an
  offset between them that is larger along the relation's axis than across it.
  """
  seen = look(pixels)
  if len(seen) != len(content.things):
    return f'{len(seen)} thing{"" if len(seen) == 1 else "s"}, not {len(content.things)}'
  if len(seen) == 1:
    return _mismatch(seen[0], content.things[0])
  orders = [seen, seen[::-1]]
  faults = [' and '.join(filter(None, map(_mismatch, order, content.things))) for order in orders]
  if all(faults):
    return min(faults, key=len)
  # If both things match both descriptions, either may be the first.
  holds = any(_relation_holds(*order, content.relation)
              for order, wrong in zip(orders, faults) if not wrong)
  return '' if holds else f'not {content.relation}'


def _relation_holds(first, second, relation):
  (x, y), (u, v) = first.center, second.center
  right, down = u - x, v - y
  along = {'left of': right, 'right of': -right, 'above': down, 'below': -down}[relation]
  return along > abs(down if relation in ('left of', 'right of') else right)


def _mismatch(seen, content):
  if seen.thing.matches(content):
    return ''
  known = ' '.join(word for word, stated in zip(seen.thing, content) if stated and word)
  return f'{known or "something unclear"}, not {content}'


def pairs(content: CaptionContent) -> list[str]:
  """The names of the things in a caption, such as 'red circle'."""
  return [f'{thing.color} {thing.shape}' for thing in content.things]


def faithfulness(faults: Sequence[str], contents: Sequence[CaptionContent], known: Sequence[str]
                 ) -> dict[str, float]:
  """Shares of pictures that match their caption.

  Args:
    faults: the result of `fault` for each picture.
    contents: the content of each caption.
    known: names such as 'red circle' that occurred in training.

  Returns:
    'faithfulness' of all, 'one_object', 'two_objects', and each of the three with '/seen' for
    captions whose names are all known, and '/unseen' for others; and their numbers of examples
    under 'examples/...'.
  """
  groups = collections.defaultdict(list)
  for bad, content in zip(faults, contents):
    ends = ('', '/seen' if set(pairs(content)) <= set(known) else '/unseen')
    kind = 'two_objects' if content.relation else 'one_object'
    for name, end in itertools.product(('faithfulness', kind), ends):
      groups[name + end].append(not bad)
  shares: Mapping[str, float] = {name: float(np.mean(right)) for name, right in groups.items()}
  return {**shares, **{f'examples/{name}': len(right) for name, right in groups.items()}}
