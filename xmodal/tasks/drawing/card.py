"""Draws pictures with lines of text under them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.tasks.drawing import lettering

WIDTH = 384
_MARGIN, _FONT_SIZE = 10, 16
RIGHT, WRONG, PLAIN = '#0a7a2f', '#b3261e', '#202124'
_FRAME, _FAINT = '#c8c8c8', '#6b6f76'


def shown(example: Example, pixels: np.ndarray) -> np.ndarray:
  """The picture for a card, uint8 [H, W, 3]: the example's own, in its own shape.

  pixels: the model's input, returned if the picture was hidden from the model.
  """
  return images.load_within(example.image, WIDTH)[0] if pixels.any() else pixels


def draw_card(pixels: np.ndarray, lines: Sequence[tuple[str, str]]) -> Image.Image:
  """Puts (text, colour) lines under an enlarged picture (uint8 [H, W, 3])."""
  return add_lines(resize(pixels, WIDTH), lines)


def resize(pixels: np.ndarray, width: int) -> Image.Image:
  """Resizes a picture (uint8 [H, W, 3]) to about a width; its height is at most twice the width."""
  factor = min(width / pixels.shape[1], 2 * width / pixels.shape[0])
  if factor >= 2:
    # Integer factors and hard edges show a small picture's pixels as the model gets them.
    factor, method = int(factor), Image.Resampling.NEAREST
  else:
    method = Image.Resampling.BICUBIC
  size = [max(1, round(side * factor)) for side in pixels.shape[1::-1]]
  return Image.fromarray(pixels).resize(size, method)


def add_lines(picture: Image.Image, lines: Sequence[tuple[str, str]]) -> Image.Image:
  """Puts (text, colour) lines under a picture, and a note if letters have no font."""
  width = max(WIDTH, picture.width)
  note = lettering.note([text for text, _ in lines])
  wrapped = [(part, colour) for text, colour in [*lines, (note, _FAINT)][:len(lines) + bool(note)]
             for part in lettering.wrap(text, _FONT_SIZE, width)]
  step = _FONT_SIZE + 5
  size = (width + 2 * _MARGIN, picture.height + 3 * _MARGIN + step * len(wrapped))
  card = Image.new('RGB', size, 'white')
  card.paste(picture, ((size[0] - picture.width) // 2, _MARGIN))
  pen = ImageDraw.Draw(card)
  left = (size[0] - picture.width) // 2
  # A thin frame makes the edge of a white picture visible.
  pen.rectangle((left - 1, _MARGIN - 1, left + picture.width, _MARGIN + picture.height), None,
                _FRAME)
  for row, (text, colour) in enumerate(wrapped):
    place = _MARGIN, picture.height + 2 * _MARGIN + row * step
    lettering.draw_text(pen, place, text, colour, _FONT_SIZE)
  return card


def draw_grid(pictures: Sequence[tuple[np.ndarray, str]], columns: int = 4) -> Image.Image:
  """Pictures (uint8 [H, W, 3]) in a grid, each uncropped in a square with a coloured frame."""
  side = WIDTH // columns
  rows = -(-len(pictures) // columns)
  grid = Image.new('RGB', (columns * side, rows * side), 'white')
  for number, (pixels, colour) in enumerate(pictures):
    tile = Image.new('RGB', (side - 4, side - 4), colour)
    inside = ImageOps.contain(Image.fromarray(pixels), (side - 12, side - 12))
    tile.paste(inside, ((tile.width - inside.width) // 2, (tile.height - inside.height) // 2))
    grid.paste(tile, (number % columns * side + 2, number // columns * side + 2))
  return grid


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
  """Stacks pictures vertically, aligned left."""
  size = max(p.width for p in pictures), sum(p.height for p in pictures)
  sheet = Image.new('RGB', size, 'white')
  top = 0
  for picture in pictures:
    sheet.paste(picture, (0, top))
    top += picture.height
  return sheet


def tile(pictures: np.ndarray, gap: int = 2) -> Image.Image:
  """Tiles pictures (uint8 [N, H, W, 3]) in a square grid with white gaps."""
  count, height, width = pictures.shape[:3]
  columns = int(np.ceil(np.sqrt(count)))
  rows = -(-count // columns)
  sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
  for number, picture in enumerate(pictures):
    row, column = divmod(number, columns)
    sheet[row * (height + gap):, column * (width + gap):][:height, :width] = picture
  return Image.fromarray(sheet)
