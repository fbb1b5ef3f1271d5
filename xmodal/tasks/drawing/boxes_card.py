"""Draws detected boxes with their labels on a picture."""

import bisect
from collections.abc import Iterable, Sequence
import zlib

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from xmodal.tasks.drawing import card, lettering

Box = Sequence[float]  # (x, y, width, height) in pixels

_LARGEST, _DASH, _PADDING = 640, 4, 3
# Distinct from each other, and from black and white.
_PALETTE = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#a83ccf', '#42d4f4', '#f032e6', '#bfef45',
            '#fabed4', '#469990', '#9a6324', '#ffe119', '#aaffc3', '#8f8f00')


def name_colours(names: Iterable[str]) -> dict[str, str]:
  """A colour for each name, independent of their order; up to 14 names get distinct colours."""
  colours, free = {}, []
  for name in sorted(set(names)):
    free = free or list(_PALETTE)
    checksum = zlib.crc32(name.encode())
    preferred = _PALETTE[checksum % len(_PALETTE)]
    colours[name] = preferred if preferred in free else free[checksum % len(free)]
    free.remove(colours[name])
  return colours


def draw_boxes_card(pixels: np.ndarray, found: Sequence[tuple[str, Box, str]],
                    truths: Sequence[Box], lines: Sequence[tuple[str, str]]) -> Image.Image:
  """draw_boxes with (text, colour) lines under it."""
  legend = [('dashed: the truth', card.PLAIN)] if truths else []
  if note := lettering.note([label for label, _, _ in found]):
    legend.append((note, card.PLAIN))
  return card.add_lines(draw_boxes(pixels, found, truths), [*lines, *legend])


def draw_boxes(pixels: np.ndarray, found: Sequence[tuple[str, Box, str]],
               truths: Sequence[Box] = ()) -> Image.Image:
  """Draws detections and ground truth on an enlarged picture.

  Args:
    pixels: uint8 [H, W, 3].
    found: (label, box in these pixels, colour as '#rrggbb'), the most important first: it
      is on top, and its label is placed first.
    truths: boxes in these pixels, drawn thin and dashed.
  """
  height, width = pixels.shape[:2]
  picture = card.resize(pixels, min(max(width, card.WIDTH), _LARGEST))
  scale = picture.width / width, picture.height / height
  corners = [_corners(box, scale, picture.size) for _, box, _ in found]
  pen = ImageDraw.Draw(picture)
  line = max(2, round(min(picture.size) / 160))
  for (x0, y0, x1, y1), (_, _, colour) in reversed(list(zip(corners, found))):
    # The dark edge separates the line from a background of the same colour.
    pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline='black', width=line + 2)
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
  for box in truths:
    _draw_dashes(pen, _corners(box, scale, picture.size))
  _draw_tags(pen, picture.size, found, corners)
  return picture


def _corners(box, scale, size):
  """Corner pixels (x0, y0, x1, y1) of a box in the drawn picture, the last inclusive."""
  x, y, width, height = box
  # A broken model's boxes are not finite.
  ends = np.nan_to_num(np.array([x, y, x + width, y + height]) * (*scale, *scale))
  x0, y0, x1, y1 = np.clip(np.rint(ends), 0, (*size, *size)).astype(int).tolist()
  x0, y0 = min(x0, size[0] - 1), min(y0, size[1] - 1)
  return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _draw_dashes(pen, corners):
  """White dashes on a black line: visible on any picture, and unlike any name's colour."""
  x0, y0, x1, y1 = corners
  pen.rectangle(corners, outline='black')
  for x in range(x0, x1 + 1, 2 * _DASH):
    for y in (y0, y1):
      pen.line((x, y, min(x + _DASH - 1, x1), y), fill='white')
  for y in range(y0, y1 + 1, 2 * _DASH):
    for x in (x0, x1):
      pen.line((x, y, x, min(y + _DASH - 1, y1)), fill='white')


def _draw_tags(pen, size, found, corners):
  letters = max(11, round(min(size) / 32))
  boxes = np.array(corners).reshape(-1, 4)
  tags, texts = [], []
  for label, _, _ in found:
    texts.append(_shortened(label, letters, size[0] - 2 * _PADDING))
    wanted = np.array([lettering.length(texts[-1], letters) + 2 * _PADDING,
                       sum(lettering.metrics(letters))])
    tags.append(_free_place(np.ceil(wanted), boxes[len(tags)], boxes, np.array(tags), size))
  for (x0, y0, x1, y1), text, (_, _, colour) in reversed(list(zip(tags, texts, found))):
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    light = np.dot(ImageColor.getrgb(colour), (0.299, 0.587, 0.114)) > 120
    lettering.draw_text(pen, (x0 + _PADDING, y0), text, 'black' if light else 'white', letters)


def _shortened(text, size, width):
  """The text, shortened before its last four letters (' 97%') if it is too wide."""
  if lettering.length(text, size) <= width:
    return text
  kept = bisect.bisect_right(range(max(len(text) - 4, 1)), width, key=lambda cut: lettering.length(
      f'{text[:cut]}...{text[-4:]}', size))
  return f'{text[:max(kept - 1, 0)]}...{text[-4:]}'


def _free_place(tag, own, boxes, tags, size):
  """Place near its box where a tag (width, height) hides the least: (x0, y0, x1, y1), exclusive."""
  width, height = tag
  x0, y0, x1, y1 = own
  left, right = x0, x1 + 1 - width
  corners = np.array([(x, y) for y in (y0 - height, y1 + 1, y0, y1 + 1 - height)
                      for x in (left, right)])
  low = np.maximum(0, np.minimum(corners, np.array(size) - tag))
  places = np.concatenate([low, low + tag], axis=1)
  # Hiding another tag is worse than hiding a part of an object.
  hidden = _overlap(places, boxes) + 10 * _overlap(places, tags)
  return places[hidden.argmin()].astype(int)


def _overlap(places, others):
  """Area of each place covered by others, [N]; overlaps of others count repeatedly."""
  if not len(others):
    return np.zeros(len(places))
  shared = (np.minimum(places[:, None, 2:], others[:, 2:])
            - np.maximum(places[:, None, :2], others[:, :2]))
  return np.maximum(shared, 0).prod(-1).sum(-1)
