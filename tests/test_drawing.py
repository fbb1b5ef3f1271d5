"""Drawn predictions: boxes in place, readable labels."""

import numpy as np
from PIL import Image, ImageColor
import pytest

from xmodal.tasks.drawing import card
from xmodal.tasks.drawing.boxes_card import draw_boxes, draw_boxes_card, name_colours

GREY = 120
RED, BLUE = '#ff0000', '#0000ff'


def grey(height, width):
  return np.full((height, width, 3), GREY, np.uint8)


def where(picture, colour):
  """Mask [H, W] of the pixels of a colour."""
  return (np.asarray(picture) == ImageColor.getrgb(colour)).all(-1)


def ends(mask):
  """(first, last) true index of a row or column."""
  places = np.flatnonzero(mask)
  return int(places[0]), int(places[-1])


@pytest.mark.parametrize('size, factor', [((48, 48), 8), ((300, 192), 2), ((240, 320), 1.2),
                                          ((480, 640), 1), ((1200, 1280), 0.5)])
def test_a_box_is_where_it_should_be(size, factor):
  height, width = size
  x, y, w, h = width // 4, height // 3, width // 2, height // 2
  picture = draw_boxes(grey(*size), [('cat 97%', (x, y, w, h), RED)])
  assert picture.size == (width * factor, height * factor)
  red = where(picture, RED)
  middle, centre = int((y + h / 2) * factor), int((x + w / 2) * factor)
  assert ends(red[middle]) == (round(x * factor), round((x + w) * factor) - 1)
  assert ends(red[middle:, centre])[1] + middle == round((y + h) * factor) - 1
  line = red[middle].sum() // 2
  assert 2 <= line <= 4
  inside = np.asarray(picture)[round(y * factor) + line + 1:round((y + h) * factor) - line - 1,
                               round(x * factor) + line + 1:round((x + w) * factor) - line - 1]
  # Nothing is drawn on the object itself, because the label fits beside it.
  assert (inside == GREY).all()


@pytest.mark.parametrize('box', [(0, 0, 64, 64), (-9, -9, 90, 90), (60, 60, 20, 20), (-5, 30, 9, 9),
                                 (63.9, 63.9, 0.1, 0.1), (10, 10, 0, 0), (200, -80, 5, 5),
                                 (np.nan,) * 4, (3, np.inf, 4, np.inf)])
def test_boxes_at_the_edge_stay_in_the_picture(box):
  picture = draw_boxes(grey(64, 64), [('cat 97%', box, RED)])
  red = where(picture, RED)
  assert picture.size == (384, 384) and red.any()
  if box[2] >= 64:
    assert red[0].any() and red[-1].all() and red[:, 0].all() and red[:, -1].all()
  # The whole label, larger than a small box, lies inside the picture.
  alone = where(draw_boxes(grey(64, 64), [('cat 97%', (20, 30, 0, 0), RED)]), RED)
  assert red.sum() >= 0.95 * alone.sum()


def test_two_labels_of_one_place_are_both_seen():
  box = (10, 20, 30, 24)
  both = draw_boxes(grey(64, 64), [('cat 97%', box, RED), ('dog 41%', box, BLUE)])
  alone = draw_boxes(grey(64, 64), [('dog 41%', box, BLUE)])
  # The first box hides the second, but for its label.
  x, y, w, h = np.array(box) * 6
  inner = (slice(y, y + h), slice(x, x + w))
  assert where(alone, BLUE)[inner].sum() > 500
  assert not where(both, BLUE)[y + 40:y + h, x:x + 20].any()
  outside = where(alone, BLUE)
  outside[inner] = False
  assert outside.sum() > 300 and where(both, BLUE).sum() >= outside.sum()


def test_many_boxes_and_hardly_any_room():
  rng = np.random.default_rng(0)
  names = [f'thing number {i}' for i in range(40)]
  colours = name_colours(names)
  for height, width in ((48, 48), (700, 90), (30, 500), (1, 1), (2, 900)):
    found = [(f'{name} 50%', tuple(rng.uniform(-50, 500, 4)), colours[name]) for name in names * 4]
    picture = draw_boxes_card(grey(height, width), found, [box for _, box, _ in found[:50]],
                              [('many', card.PLAIN)])
    assert 300 < picture.width < 700 and picture.height < 1500


def test_the_truth_is_dashed_and_on_top():
  box = (8, 16, 24, 32)
  picture = draw_boxes(grey(64, 64), [('', box, RED)], [box])
  left = np.asarray(picture)[120:220, 8 * 6]
  assert {tuple(p) for p in left.tolist()} == {(0, 0, 0), (255, 255, 255)}
  assert where(picture, RED)[120:220, 8 * 6 + 1].all()


def test_a_card_has_its_lines_and_explains_the_dashes():
  lines = [('found: cat', card.RIGHT), ('missed: dog', card.WRONG)]
  plain = draw_boxes_card(grey(64, 64), [], [], lines)
  explained = draw_boxes_card(grey(64, 64), [], [(1, 1, 9, 9)], lines)
  assert where(plain, card.RIGHT).any() and where(plain, card.WRONG).any()
  assert not where(plain, card.PLAIN).any() and where(explained, card.PLAIN).any()
  assert (plain.width, plain.height) == (404, 384 + 30 + 2 * 21)
  assert explained.height == plain.height + 21


def test_lines_use_the_width_of_the_card():
  line = [('word ' * 16, card.PLAIN)]
  narrow = card.add_lines(Image.new('RGB', (100, 50)), line)
  wide = card.add_lines(Image.new('RGB', (700, 50)), line)
  assert narrow.width == 404 and wide.width == 720
  assert wide.height < narrow.height


def test_tall_pictures_make_no_endless_card():
  assert card.draw_card(grey(3000, 100), []).height < 3 * card.WIDTH


def test_names_have_colours_of_their_own():
  names = [f'name {i}' for i in range(14)]
  colours = name_colours(names)
  assert len(set(colours.values())) == 14
  assert name_colours(names[::-1]) == colours  # any order
  assert name_colours(['cat']) == {'cat': '#aaffc3'}  # any process, any day
  shared = list(name_colours(map(str, range(28))).values())
  assert all(shared.count(colour) == 2 for colour in shared)


def test_labels_can_be_read():
  """WCAG 2's contrast of text and background, 3 or more for all colours."""
  def luminance(rgb):
    value = np.array(rgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))

  for colour in name_colours(map(str, range(14))).values():
    picture = np.asarray(draw_boxes(grey(200, 384), [('MMMM', (100, 100, 90, 50), colour)]))
    above = picture[:99]
    rows, columns = where(above, colour).nonzero()
    tag = above[rows.min():rows.max() + 1, columns.min():columns.max() + 1].reshape(-1, 3)
    found = {tuple(pixel) for pixel in tag.tolist()}
    (text,) = found & {(0, 0, 0), (255, 255, 255)}
    dark, light = sorted([luminance(text), luminance(ImageColor.getrgb(colour))])
    assert (light + 0.05) / (dark + 0.05) >= 3, colour
