"""Changes to a picture that leave the right answer right.

A change is allowed only where no text of the example speaks of what it would
change: no mirror image where a question or answer says 'left', nor where
letters or clocks are read; no shift or zoom where a text speaks of a place or a
size; no change of light where it speaks of brightness or contrast. A word is
taken at its worst: 'upright' costs a mirror image, and no more. Nothing is ever
cut off, so that counts and objects stay.
"""

import dataclasses
import re

import numpy as np

from xmodal.data.example import Example

# Whole words, and stems that any word may hold: 'leftmost', 'hyperdense'.
_SIDE_STEMS = ('left', 'right')
_MIRROR_WORDS = frozenset(
    'clockwise counterclockwise anticlockwise east west eastern western port starboard side sides '
    'sided read reads letter letters word words written write writing number numbers say says sign '
    'spell text time clock lateral laterality unilateral'.split())
_PLACE_WORDS = _MIRROR_WORDS | frozenset(
    'top topmost bottom bottommost upper uppermost lower lowermost lowest middle center centre '
    'central corner corners edge edges border half quadrant where location located position '
    'positioned place size big bigger biggest large larger largest small smaller smallest tiny '
    'huge near nearer nearest close closer closest far farther farthest furthest high higher '
    'highest low tall taller tallest'.split())
_LIGHT_WORDS = frozenset(
    'light lights lighter lightest lighting daylight lit dim dimmer dimly sunny day daytime night '
    'nighttime'.split())
_LIGHT_STEMS = ('bright', 'dark', 'shad', 'contrast', 'intens', 'dens', 'opac', 'opaq', 'lucen')


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where a stored picture lies within the model's input.

  Attributes:
    width, height: of the stored picture, in pixels.
    scale: share of the input's width and height that the picture fills.
    left, top: its top left corner in the input, in 0..1 of the input.
    mirrored: the picture was flipped left to right before it was placed.
  """

  width: float
  height: float
  scale: float = 1.0
  left: float = 0.0
  top: float = 0.0
  mirrored: bool = False

  def boxes(self, boxes: np.ndarray) -> np.ndarray:
    """Boxes (x, y, w, h) in picture pixels, [N, 4], as (x0, y0, x1, y1) in 0..1 of the input."""
    x0, y0, w, h = np.asarray(boxes, np.float32).reshape(-1, 4).T
    if self.mirrored:
      x0 = self.width - x0 - w
    across, down = self.scale / self.width, self.scale / self.height
    return np.stack([self.left + x0 * across, self.top + y0 * down,
                     self.left + (x0 + w) * across, self.top + (y0 + h) * down], axis=-1)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What may be changed, and how far; drawn anew for every visit to an example.

  Attributes:
    mirror: flip left to right half of the time.
    zoom: largest share by which the picture is shrunk, and then put anywhere.
    light: largest relative change of brightness and of contrast.
  """

  mirror: bool = False
  zoom: float = 0.0
  light: float = 0.0

  def plan(self, example: Example, rng: np.random.Generator) -> 'Plan':
    """Draws what happens to one example; always takes the same number of draws."""
    draws = rng.random(6)
    names = (o.name for o in example.objects or ())
    words = set(re.findall(r'[a-z]+', ' '.join(
        (example.question, *example.answers, *example.captions, *names, example.reason)).lower()))
    mirror = self.mirror and draws[0] < 0.5 and not _any_of(words, _MIRROR_WORDS, _SIDE_STEMS)
    zoom = 0.0 if _any_of(words, _PLACE_WORDS, _SIDE_STEMS) else self.zoom
    light = 0.0 if _any_of(words, _LIGHT_WORDS, _LIGHT_STEMS) else self.light
    return Plan(mirror, 1.0 - zoom * draws[1], draws[2], draws[3],
                1.0 + light * (2 * draws[4] - 1), 1.0 + light * (2 * draws[5] - 1))


def _any_of(words, known, stems):
  return not words.isdisjoint(known) or any(stem in word for word in words for stem in stems)


@dataclasses.dataclass(frozen=True)
class Plan:
  """One drawn change: mirror, size and place (0..1 of the room left), brightness, contrast."""

  mirror: bool = False
  scale: float = 1.0
  across: float = 0.0
  down: float = 0.0
  brightness: float = 1.0
  contrast: float = 1.0

  def inner_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels to which the picture is resized before it is placed."""
    return max(1, round(size[0] * self.scale)), max(1, round(size[1] * self.scale))

  def apply(self, pixels: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, dict]:
    """Places resized pixels (uint8 [h, w, 3]) in the input (uint8 [H, W, 3]).

    Returns:
      The input, and the fields of its Placement but the stored picture's size.
    """
    if self.mirror:
      pixels = pixels[:, ::-1]
    if (self.brightness, self.contrast) != (1.0, 1.0):
      levels = np.arange(256, dtype=np.float32) * self.brightness
      table = np.clip((levels - 128) * self.contrast + 128.5, 0, 255).astype(np.uint8)
      pixels = table[pixels]
    height, width = pixels.shape[:2]
    if (height, width) == tuple(size):
      return pixels, {'mirrored': self.mirror}
    top, left = int((size[0] - height) * self.down), int((size[1] - width) * self.across)
    canvas = np.empty((*size, 3), np.uint8)
    canvas[:] = pixels.reshape(-1, 3).mean(0).astype(np.uint8)
    canvas[top:top + height, left:left + width] = pixels
    return canvas, {'mirrored': self.mirror, 'scale': width / size[1],
                    'left': left / size[1], 'top': top / size[0]}
