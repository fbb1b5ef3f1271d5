"""A picture with lines of text under it, for people to look at."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _FONT_SIZE = 384, 10, 16
RIGHT, WRONG, PLAIN = '#0a7a2f', '#b3261e', '#202124'


def draw_card(pixels: np.ndarray, lines: Sequence[tuple[str, str]]) -> Image.Image:
  """Puts (text, colour) lines under a picture (uint8 [H, W, 3]), enlarged to be seen."""
  height, width = pixels.shape[:2]
  # Whole factors with hard edges show small pictures as the model gets them.
  factor = _WIDTH // width if width <= _WIDTH // 2 else _WIDTH / width
  method = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.BICUBIC
  picture = Image.fromarray(pixels).resize((round(width * factor), round(height * factor)), method)
  font = ImageFont.load_default(_FONT_SIZE)
  wrapped = [(part, colour) for text, colour in lines
             for part in textwrap.wrap(text, 44) or ['']]
  step = _FONT_SIZE + 5
  size = (_WIDTH + 2 * _MARGIN, picture.height + 3 * _MARGIN + step * len(wrapped))
  card = Image.new('RGB', size, 'white')
  card.paste(picture, ((size[0] - picture.width) // 2, _MARGIN))
  pen = ImageDraw.Draw(card)
  for row, (text, colour) in enumerate(wrapped):
    pen.text((_MARGIN, picture.height + 2 * _MARGIN + row * step), text, colour, font)
  return card
