"""Image augmentation that keeps the right answer right.

A change is applied only if no text of the example mentions what it would change:
no mirroring where a question or answer says 'left', no vertical flip where it says
'above', neither where letters or clocks are read; no shift or zoom where a text
mentions a place or a size, or the answer is a number; no change of light where it
mentions brightness or contrast. The match is cautious: 'upright' merely prevents
a mirroring. The word lists are English: if a sentence does not read as English, or
an object's name may name a side in another language, the changes that words might
mention are skipped (language_notes counts such examples). Only examples whose sole
text is object names are cropped, and objects that are cut off are removed; all other
examples are never cropped, so that counts and objects remain correct.
"""

from collections.abc import Sequence
import dataclasses
import re

import cv2
import numpy as np

from xmodal.data.english import foreign_text, has_no_foreign_side
from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.data.pictures.placement import Placement
from xmodal.data.sources.files import shown
from xmodal.options import Option

_JUDGED = 500  # examples whose language is detected where an overview counts none
# Whole words, and stems found anywhere in a word: 'leftmost', 'hyperdense'.
_SIDE_STEMS = ('left', 'right')
_MIRROR_WORDS = frozenset(
    'clockwise counterclockwise anticlockwise east west eastern western port starboard side sides '
    'sided read reads letter letters word words written write writing number numbers say says sign '
    'spell text time clock lateral laterality unilateral'.split())
_FLIP_WORDS = _MIRROR_WORDS | frozenset(
    'up upper uppermost upward upwards upright upside uphill upstairs top topmost high higher '
    'highest low lower lowest lowermost on onto off over overhead overlie overlying under '
    'underneath above below beneath north south northern southern superior inferior superiorly '
    'inferiorly sky ground floor ceiling stand stands standing lie lies lying hang hangs hanging '
    'fall falls falling rise rises rising tilt tilted slope sloping'.split())
_FLIP_STEMS = ('down', 'bottom', 'vertical')
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
# An example with any of these describes the whole picture, so it is not cropped.
_WHOLE_PICTURE = ('question', 'answers', 'captions', 'expression', 'number', 'reason')


OPTIONS = {
    'mirror': Option(False, 'Flip left to right with probability 0.5.'),
    'zoom': Option(0.0, 'Largest share by which the picture is shrunk; its position is random.',
                   low=0, high=0.99),
    'light': Option(0.0, 'Largest relative change of brightness and of contrast.', low=0, high=1),
    'crop': Option(0.0, 'Largest share cut from each side length, at a random position.', low=0,
                   high=0.9),
    'flip': Option(False, 'Flip top to bottom with probability 0.5: for pictures without up and '
                          'down.')}


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Which changes are allowed, and how large; sampled anew at every visit to an example.

  Attributes:
    mirror: flip left to right with probability 0.5.
    zoom: largest share by which the picture is shrunk; its position is random.
    light: largest relative change of brightness and of contrast.
    crop: largest share cut from each side length, at a random position.
    flip: flip top to bottom with probability 0.5, for pictures that have no up and
      down (cells under a microscope).
  """

  mirror: bool = False
  zoom: float = 0.0
  light: float = 0.0
  crop: float = 0.0
  flip: bool = False

  def draw(self, example: Example, rng: np.random.Generator) -> 'Transform':
    """Samples the transform of one example; always takes the same number of random draws."""
    draws = rng.random(11)
    named = (*(example.objects or ()), *filter(None, [example.expression]))
    words = set(re.findall(r'[a-z]+', ' '.join(
        (example.question, *example.answers, *example.captions, *(o.name for o in named),
         example.reason)).lower()))
    english = foreign_text(example) is None
    turns = english and all(map(has_no_foreign_side, (*(o.name for o in named), *example.answers)))
    mirror = (self.mirror and draws[0] < 0.5 and turns
              and not _any_of(words, _MIRROR_WORDS, _SIDE_STEMS))
    # A number may measure the picture.
    still = (not english or example.number is not None
             or _any_of(words, _PLACE_WORDS, _SIDE_STEMS))
    zoom = 0.0 if still else self.zoom
    bright = not english or _any_of(words, _LIGHT_WORDS, _LIGHT_STEMS)
    light = 0.0 if bright else self.light
    crop = 0.0 if any(map(example.has, _WHOLE_PICTURE)) else self.crop
    flip = (self.flip and draws[10] < 0.5 and turns
            and not _any_of(words, _FLIP_WORDS, _FLIP_STEMS))
    width, height = 1.0 - crop * draws[6], 1.0 - crop * draws[7]
    x0, y0 = (1.0 - width) * draws[8], (1.0 - height) * draws[9]
    return Transform(mirror, 1.0 - zoom * draws[1], draws[2], draws[3],
                1.0 + light * (2 * draws[4] - 1), 1.0 + light * (2 * draws[5] - 1),
                flip, (x0, y0, x0 + width, y0 + height))


def language_notes(augmentation: Augmentation, examples: Sequence[Example]) -> list[str]:
  """Notes on examples that stay unchanged because they may not be English; [] if none."""
  changes = [key for key in ('mirror', 'flip', 'zoom', 'light') if getattr(augmentation, key)]
  if not changes:
    return []
  notes, overview = [], getattr(examples, 'overview', None)
  if overview and overview.foreign is None:
    examples = [examples[i] for i in range(min(len(examples), _JUDGED))]
  count, text = (overview and overview.foreign) or _count_foreign(examples)
  if count:
    notes.append(f'{count:,} of {len(examples):,} examples do not read as English, such as '
                 f'{shown(text)}: data.augment ({", ".join(changes)}) does not change them, as '
                 'their words may mention what would change')
  if turns := [key for key in ('mirror', 'flip') if key in changes]:
    known = overview.names if overview else {o.name for e in examples for o in e.objects or ()}
    if names := [name for name in known if not has_no_foreign_side(name)]:
      notes.append(f'{len(names):,} names of objects may name a side in a language other than '
                   f'English, such as {shown(min(names))}: data.augment ({", ".join(turns)}) does '
                   'not change their pictures')
  return notes


def _count_foreign(examples):
  """Number of examples that do not read as English, and the first such text."""
  texts = [text for example in examples if (text := foreign_text(example)) is not None]
  return len(texts), texts[0] if texts else ''


def _any_of(words, known, stems):
  return not words.isdisjoint(known) or any(stem in word for word in words for stem in stems)


@dataclasses.dataclass(frozen=True)
class Transform:
  """One sampled change, applied in the order crop, light, mirror, flip, zoom.

  Attributes:
    mirror, flip: whether to flip left to right, top to bottom.
    scale: side lengths of the picture as a share of the available area's.
    across, down: position of the picture, as a share (0..1) of the space left over.
    brightness, contrast: factors.
    window: (x0, y0, x1, y1), the part that the crop keeps, in 0..1 of the picture.
  """

  mirror: bool = False
  scale: float = 1.0
  across: float = 0.0
  down: float = 0.0
  brightness: float = 1.0
  contrast: float = 1.0
  flip: bool = False
  window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

  def apply(self, picture: images.Decoded, out: np.ndarray,
            keep_aspect: bool = False) -> tuple[Placement, tuple[int, int]]:
    """Writes the transformed picture to the model's input.

    Args:
      picture: the picture.
      out: uint8 [H, W, 3], the input, all 0.
      keep_aspect: see BatchMaker.

    Returns:
      The picture's placement, and the (height, width) in pixels of the area it was given at the
      top left: the whole input, or with keep_aspect the largest area of the picture's aspect
      ratio. Whatever the picture leaves of that area has its mean colour.
    """
    size = height, width = picture.size
    part, input_size = (0, 0, width, height), out.shape[:2]
    if self.window != (0, 0, 1, 1):
      picture, part = images.crop(picture, self.window)
    extent = images.size_within(picture.size, input_size) if keep_aspect else input_size
    room = out[:extent[0], :extent[1]]
    height, width = (max(1, round(side * self.scale)) for side in extent)
    in_place = (height, width) == extent and not self.mirror and not self.flip
    pixels, _ = images.fit(picture, (height, width), room if in_place else None)
    if (self.brightness, self.contrast) != (1.0, 1.0):
      levels = np.arange(256, dtype=np.float32) * self.brightness
      table = np.clip((levels - 128) * self.contrast + 128.5, 0, 255).astype(np.uint8)
      cv2.LUT(pixels, table, pixels)
    if (height, width) != extent:  # OpenCV's sum and fill: numpy's take longer than the resize
      mean = [total // (height * width) for total in cv2.sumElems(pixels)[:3]]
      cv2.rectangle(room, (0, 0), extent[::-1], mean, cv2.FILLED)
    top, left = int((extent[0] - height) * self.down), int((extent[1] - width) * self.across)
    if not in_place:
      turned = pixels[::-1 if self.flip else 1, ::-1 if self.mirror else 1]
      room[top:top + height, left:left + width] = turned
    return Placement.of_part(size, part, (left, top, left + width, top + height), input_size,
                             mirrored=bool(self.mirror), flipped=bool(self.flip)), extent
