"""Draws text on pictures, in all scripts with fonts.

The fonts are Kurinto Sans (SIL Open Font License) of the package weblate-fonts. They cover Latin,
Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic, Ethiopic, the scripts of India and Sri Lanka,
Thai, Lao, Chinese, Japanese and Korean, but not Khmer, Burmese, Tibetan or emoji. A letter
without a font is shown as its code point, such as \\u1780. Joined and reordered letters (Arabic,
Hebrew, Hindi) need Pillow with Raqm, which its wheels have, and the system's FriBiDi library.
"""

import bisect
from collections.abc import Sequence
import functools
import importlib.util
import os
import re
import unicodedata

from PIL import ImageDraw, ImageFont, features

_FOLDER = ('static', 'weblate_fonts', 'kurinto', 'ttf')
_KINDS = ('', 'JP', 'KR', 'SC', 'TC')  # the first has all but Chinese and Korean letters
_NO_CHARACTER = '\uffff'  # every font draws its box for this one
_KANA, _HANGUL = re.compile('[\u3040-\u30ff]'), re.compile('[\u1100-\u11ff\uac00-\ud7af]')
_WIDE = '\u1100-\u11ff\u2e80-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff'
# Pieces after which a line may break: words, and single Chinese, Japanese and Korean letters.
_PIECE = re.compile(rf'\s*(?:[{_WIDE}]|[^\s{_WIDE}]+)')
_JOINED = re.compile('[\u0590-\u0fff\u1000-\u109f\u1780-\u17ff]')  # Hebrew to Tibetan, and more
_RAQM = features.check('raqm')


def draw_text(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str,
              size: int) -> None:
  """Draws one line with its top left corner at `place` (x, y); size in pixels."""
  x, y = place
  baseline = y + metrics(size)[0]
  for kind, part in _runs(text):
    font = _font(kind, size)
    pen.text((x, baseline), part, colour, font, anchor='ls')
    x += font.getlength(part)


def length(text: str, size: int) -> float:
  """Width in pixels of a line."""
  return sum(_font(kind, size).getlength(part) for kind, part in _runs(text))


def metrics(size: int) -> tuple[int, int]:
  """(ascent, descent) in pixels of a line."""
  return _font(next(iter(_kinds())), size).getmetrics()


def wrap(text: str, size: int, width: float) -> list[str]:
  """Wraps a text into lines of at most `width` pixels; [''] for an empty text."""
  lines = ['']
  for piece in _PIECE.findall(text):
    if length(lines[-1] + piece, size) > width:
      lines.append('')
      piece = piece.lstrip()
    while length(piece, size) > width and (cut := _longest_start(piece, size, width)):
      lines[-1:] = [piece[:cut], '']
      piece = piece[cut:]
    lines[-1] += piece if lines[-1] else piece.lstrip()
  return [line for line in lines if line] or ['']


def _longest_start(piece, size, width):
  """Index at which to cut a piece that is too wide, not before an accent; 0: nowhere."""
  cuts = [i for i in range(1, len(piece)) if not _continues(piece[i])]
  fitting = bisect.bisect_right(cuts, width, key=lambda i: length(piece[:i], size))
  return cuts[max(fitting, 1) - 1] if cuts else 0


def note(texts: Sequence[str]) -> str:
  """A note if letters have no font or are not joined; '' if all are drawn correctly."""
  parts = [part for text in texts for part in _parts(text)]
  if any(kind is None for kind, _ in parts):
    way = ': pip install weblate-fonts' if len(_kinds()) == 1 else ''
    return f'\\u... is the number of a letter that no font here has{way}'
  if not _RAQM and any(kind is not None and _JOINED.search(part) for kind, part in parts):
    return 'letters stand unjoined, left to right: Pillow finds no FriBiDi library (libfribidi)'
  return ''


def _runs(text):
  """(font's kind, part) of each part of a text, with code points for letters without a font."""
  for kind, part in _parts(text):
    if kind is None:
      kind = next(iter(_kinds()))
      part = ''.join(f'\\u{ord(c):04x}' if ord(c) < 2 ** 16 else f'\\U{ord(c):08x}' for c in part)
    yield kind, part


@functools.lru_cache(maxsize=1024)
def _parts(text):
  """(font's kind, part) of each part of a text; None for letters without a font."""
  kinds, parts = _in_order_for(text), []
  for character in text:
    if unicodedata.category(character) in ('Cc', 'Zl', 'Zp'):  # a font would draw a box
      character = ' '
    kind = next((kind for kind in kinds if _has(kind, character)), None)
    if _continues(character):
      before = parts[-1][0] if parts else None
      # Part of the previous letter, so it uses that letter's font.
      if before is not None and (_shows_nothing(character) or _has(before, character)):
        kind = before
      elif _shows_nothing(character):
        continue
    if parts and parts[-1][0] == kind:
      parts[-1][1] += character
    else:
      parts.append([kind, character])
  return tuple((kind, part) for kind, part in parts)


def _in_order_for(text):
  """The kinds of fonts in order of preference; Chinese letters follow the text's language."""
  first, *others = _kinds()
  own = 'JP' if _KANA.search(text) else 'KR' if _HANGUL.search(text) else 'SC'
  return [first, *sorted(others, key=lambda kind: kind != own)]


def _continues(character):
  return unicodedata.category(character)[0] == 'M' or _shows_nothing(character)


def _shows_nothing(character):
  return unicodedata.category(character) == 'Cf' or '\ufe00' <= character <= '\ufe0f'


@functools.lru_cache(maxsize=1)
def _kinds():
  """The available fonts: kind -> path; without the package only Pillow's plain Latin font."""
  found = importlib.util.find_spec('weblate_fonts')
  places = found.submodule_search_locations if found else []
  paths = {kind: os.path.join(place, *_FOLDER, f'KurintoSans{kind}-Rg.ttf')
           for place in places for kind in _KINDS}
  return {kind: path for kind, path in paths.items() if os.path.isfile(path)} or {'plain': ''}


@functools.lru_cache(maxsize=64)
def _font(kind, size, layout=None):
  path = _kinds()[kind]
  return ImageFont.truetype(path, size, layout_engine=layout) if path else (
      ImageFont.load_default(size))


@functools.lru_cache(maxsize=1 << 14)
def _has(kind, character):
  """Whether a font has a letter, that is, does not draw its box for missing letters."""
  font = _font(kind, 16, ImageFont.Layout.BASIC)  # letter by letter
  return _picture(font, character) != _picture(font, _NO_CHARACTER)


def _picture(font, character):
  mask = font.getmask(character)
  return mask.size, bytes(mask)
