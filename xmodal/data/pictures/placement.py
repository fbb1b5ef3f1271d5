"""Maps boxes between a stored picture and the model's input, and finds the visible objects."""

from collections.abc import Iterable
import dataclasses

import numpy as np

from xmodal.data.example import Object

# Visible share of an object's box below which a crop removes the object.
LEAST_VISIBLE = 0.25


@dataclasses.dataclass(frozen=True)
class Placement:
  """The affine map from a stored picture's pixels to the model's input.

  Boxes in pixels are (x, y, width, height) of the stored picture turned
  upright, as in Object; boxes of the input are (x0, y0, x1, y1) in 0..1 of its
  width and height, padding included.

  Attributes:
    width, height: of the stored picture, upright, in pixels.
    across, down: size of one picture pixel, as a share of the input's width and
      height; None: the whole picture fills the input.
    left, top: position in the input of the top left corner of the whole picture,
      after mirroring and flipping; negative if a crop cut it off.
    mirrored: left to right.
    flipped: top to bottom.
    window: (x0, y0, x1, y1) in the input of the visible part of the picture.
  """

  width: float
  height: float
  across: float | None = None
  down: float | None = None
  left: float = 0.0
  top: float = 0.0
  mirrored: bool = False
  flipped: bool = False
  window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

  def __post_init__(self):
    for field, side in (('across', self.width), ('down', self.height)):
      if getattr(self, field) is None:
        object.__setattr__(self, field, 1 / side)

  @classmethod
  def of_part(cls, size: tuple[int, int], part: tuple[float, float, float, float],
              area: tuple[float, float, float, float], input_size: tuple[int, int], *,
              mirrored: bool = False, flipped: bool = False) -> 'Placement':
    """The placement of a part of a picture on an area of the input.

    Args:
      size: (height, width) of the stored picture, in pixels.
      part: (x0, y0, x1, y1), the visible part, in pixels of the stored picture.
      area: (x0, y0, x1, y1), where that part lies, in pixels of the input.
      input_size: (height, width) of the input, in pixels.
      mirrored, flipped: as in Placement.
    """
    (height, width), (x0, y0, x1, y1) = size, part
    window = tuple(side / whole for side, whole in zip(area, (*input_size[::-1],) * 2))
    across, down = (window[2] - window[0]) / (x1 - x0), (window[3] - window[1]) / (y1 - y0)
    return cls(width, height, across, down,
               left=window[0] - across * (width - x1 if mirrored else x0),
               top=window[1] - down * (height - y1 if flipped else y0),
               mirrored=mirrored, flipped=flipped, window=window)

  def boxes(self, boxes: np.ndarray) -> np.ndarray:
    """Converts boxes in pixels, [N, 4], to boxes of the input, float32 [N, 4], not clipped."""
    return self._boxes(boxes).astype(np.float32)

  def visible(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The visible parts of boxes in pixels, [N, 4].

    Returns:
      float32 [N, 4], boxes of the input clipped to the window, and float32 [N],
      the visible share of each box's area (0 for a box without area).
    """
    whole = self._boxes(boxes)
    seen = np.minimum(np.maximum(whole, self.window[:2] * 2), self.window[2:] * 2)
    area, left = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (whole, seen))
    share = np.divide(left, area, out=np.zeros_like(area), where=area > 0)
    return seen.astype(np.float32), share.astype(np.float32)

  def pixels(self, boxes: np.ndarray) -> np.ndarray:
    """Converts boxes of the input, [N, 4], to pixels, float64 [N, 4], clipped to the picture."""
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).reshape(-1, 4).T
    x0, x1 = ((x - self.left) / self.across for x in (x0, x1))
    y0, y1 = ((y - self.top) / self.down for y in (y0, y1))
    if self.mirrored:
      x0, x1 = self.width - x1, self.width - x0
    if self.flipped:
      y0, y1 = self.height - y1, self.height - y0
    x0, x1 = (np.clip(x, 0, self.width) for x in (x0, x1))
    y0, y1 = (np.clip(y, 0, self.height) for y in (y0, y1))
    return np.stack([x0, y0, x1 - x0, y1 - y0], axis=-1)

  def _boxes(self, boxes):
    x, y, w, h = np.asarray(boxes, np.float64).reshape(-1, 4).T
    if self.mirrored:
      x = self.width - x - w
    if self.flipped:
      y = self.height - y - h
    return np.stack([self.left + x * self.across, self.top + y * self.down,
                     self.left + (x + w) * self.across, self.top + (y + h) * self.down], axis=-1)


def visible_objects(
    objects: Iterable[Object], placement: Placement) -> tuple[list[Object], np.ndarray]:
  """The objects that are visible enough (see LEAST_VISIBLE), in their order.

  An object with `ignore` is kept if any of it is visible: detecting it is no error either.

  Returns:
    The n objects, and their boxes of the input clipped to the visible part of the
    picture, float32 [n, 4].
  """
  objects = list(objects)
  boxes, share = placement.visible(np.array([o.box for o in objects]))
  kept = [i for i, (o, left) in enumerate(zip(objects, share.tolist()))
          if left >= LEAST_VISIBLE or (o.ignore and left > 0)]
  return [objects[i] for i in kept], boxes[kept]
