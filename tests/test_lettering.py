"""Text of all scripts in drawn pictures."""

import importlib.util
import unicodedata

from fontTools.ttLib import TTFont
import numpy as np
from PIL import Image, ImageDraw, features
import pytest

from xmodal.tasks.drawing import card, lettering
from xmodal.tasks.drawing.boxes_card import draw_boxes, draw_boxes_card

if importlib.util.find_spec('weblate_fonts') is None:
  pytest.skip('weblate-fonts, which xmodal installs, is not there', allow_module_level=True)

COVERED = {
    'Latin': 'caf\u00e9 na\u00efve Gr\u00f6\u00dfe \u0131\u015f\u0131k Ti\u1ebfng Vi\u1ec7t',
    'Greek': 'σκύλος', 'Cyrillic': 'Красная машина', 'Armenian': 'հայերեն', 'Georgian': 'ქართული',
    'Hebrew': 'שלום', 'Arabic': 'كلب أحمر', 'Ethiopic': 'አማርኛ', 'Devanagari': 'लाल गाड़ी',
    'Bengali': 'বাংলা', 'Gurmukhi': 'ਪੰਜਾਬੀ', 'Gujarati': 'ગુજરાતી', 'Tamil': 'தமிழ் மொழி',
    'Telugu': 'తెలుగు', 'Kannada': 'ಕನ್ನಡ', 'Malayalam': 'മലയാളം', 'Sinhala': 'සිංහල',
    'Thai': 'ภาษาไทย', 'Lao': 'ລາວ', 'Chinese': '红绿灯紅綠燈', 'Japanese': '赤い犬がゴ',
    'Korean': '한국어'}


def picture(text, size=16):
  drawn = Image.new('L', (400, 40), 'white')
  lettering.draw_text(ImageDraw.Draw(drawn), (2, 2), text, 'black', size)
  return np.asarray(drawn)


@pytest.mark.parametrize('script', COVERED)
def test_scripts_are_drawn(script):
  text = COVERED[script]
  assert all(kind is not None for kind, _ in lettering._parts(text))
  assert lettering.note([text]) == ''
  letters = [c for c in dict.fromkeys(text) if unicodedata.category(c)[0] == 'L']
  pictures = {picture(letter).tobytes() for letter in letters}
  assert len(pictures) == len(letters)  # none is the missing-glyph box
  assert lettering.length(text, 16) > 10


def test_a_letter_is_drawn_by_a_font_that_has_it():
  """The fonts' own tables list the supported letters."""
  tables = {kind: TTFont(path, lazy=True).getBestCmap()
            for kind, path in lettering._kinds().items()}
  rng = np.random.default_rng(0)
  codes = np.concatenate([rng.integers(32, 0x3000, 300), rng.integers(0x3000, 0xd7ff, 200)])
  wrong = [hex(code) for code in codes.tolist() for kind in tables
           if lettering._has(kind, chr(code)) != (code in tables[kind])]
  assert wrong == []


def test_what_no_font_has_is_shown_by_its_number():
  text = 'a \U0001f600 dog, \u1797\u17b6'
  assert [part for _, part in lettering._runs(text)] == [
      'a ', '\\U0001f600', ' dog, ', '\\u1797\\u17b6']
  pixels = np.full((48, 48, 3), 200, np.uint8)
  assert 'number of a letter' in lettering.note([text])
  plain, noted = (card.draw_card(pixels, [(line, card.PLAIN)]) for line in ('a dog', text))
  assert noted.height == plain.height + 21  # the note
  boxes = [draw_boxes_card(pixels, [(label, (1, 1, 9, 9), '#ff0000')], [], [])
           for label in ('dog', '\U0001f600')]
  assert boxes[1].height == boxes[0].height + 21


@pytest.mark.skipif(not features.check('raqm'), reason='Pillow finds no FriBiDi library here')
def test_arabic_is_joined_and_runs_from_right_to_left():
  joined = lettering.length('ببب', 40)
  assert joined < 0.9 * 3 * lettering.length('ب', 40)  # three letters that stand alone
  alef_first = picture('اببب', 24)  # the slim alef is the rightmost
  columns = np.flatnonzero((alef_first < 128).any(0))
  tall = (alef_first < 128).sum(0)
  assert tall[columns[-4]:columns[-1] + 1].max() > tall[columns[0]:columns[3]].max()


def test_letters_that_cannot_be_joined_are_told_of(monkeypatch):
  assert lettering.note(['كلب']) == '' or not features.check('raqm')
  monkeypatch.setattr(lettering, '_RAQM', False)
  assert 'unjoined' in lettering.note(['a dog', 'كلب']) and lettering.note(['a dog, 狗']) == ''


@pytest.fixture
def without_fonts(monkeypatch):
  caches = lettering._kinds, lettering._font, lettering._has, lettering._parts
  monkeypatch.setattr(lettering.importlib.util, 'find_spec', lambda name: None)
  for cache in caches:
    cache.cache_clear()
  yield
  monkeypatch.undo()
  for cache in caches:
    cache.cache_clear()


def test_without_the_package_plain_latin_is_drawn_and_the_rest_told_of(without_fonts):
  assert lettering.note(['Is there a cat?']) == ''
  assert 'pip install weblate-fonts' in lettering.note(['caf\u00e9'])
  assert [part for _, part in lettering._runs('caf\u00e9')] == ['caf', '\\u00e9']
  assert (picture('\u00e9') != picture('\u00fc')).any()


@pytest.mark.parametrize('text, count', [
    ('', 1), ('word ' * 30, None), ('一只红色的狗在公园里跑步' * 5, None), ('x' * 300, None),
    ('e\u0301' * 200, None), ('\u200b', 1), (' \n ', 1)])
def test_lines_are_as_wide_as_there_is_room(text, count):
  lines = lettering.wrap(text, 16, 200)
  assert all(lettering.length(line, 16) <= 200 for line in lines)
  assert ''.join(''.join(lines).split()) == ''.join(text.split())
  assert len(lines) == count or count is None and len(lines) >= 5
  assert all(line[:1] != '\u0301' and line == line.strip() for line in lines)
  assert all(lettering.length(line, 16) > 120 for line in lines[:-1])


def test_long_labels_are_cut_before_their_share():
  label = '红' * 500 + ' 97%'
  drawn = draw_boxes(np.full((100, 100, 3), 120, np.uint8), [(label, (5, 40, 50, 40), '#ff0000')])
  assert drawn.size == (300, 300)
