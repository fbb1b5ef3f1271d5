"""What a query sees of the pixels around its box, against Pillow's resize."""

import jax
import numpy as np
from PIL import Image
import pytest

from xmodal.models.queries import glimpse

HEIGHT, WIDTH, CELLS = 40, 56, 6
PICTURE = np.random.default_rng(0).random((1, HEIGHT, WIDTH, 1)).astype(np.float32)


@pytest.mark.parametrize('side', [3.0, 9.5, 30.0])  # of pixels: less than a cell each, and more
def test_it_is_the_picture_around_the_box_as_pillow_resizes_it(side):
  rng = np.random.default_rng(int(side))
  low = rng.uniform(0, [WIDTH - side, HEIGHT - side], (5, 2))
  seen = np.concatenate([low, low + side], axis=-1)  # what is to be seen, in pixels
  middle, half = (seen[:, :2] + seen[:, 2:]) / 2, side / 2 / 1.4
  boxes = np.concatenate([(middle - half) / [WIDTH, HEIGHT], (middle + half) / [WIDTH, HEIGHT]], -1)
  found = glimpse(PICTURE, np.float32(boxes)[None], CELLS, zoom=1.4)
  for crop, corners in zip(found[0], seen):
    expected = Image.fromarray(PICTURE[0, ..., 0]).resize(
        (CELLS, CELLS), Image.Resampling.BILINEAR, box=tuple(corners))
    np.testing.assert_allclose(crop[..., 0], expected, atol=1e-5)


def test_beyond_the_picture_there_is_nothing_and_boxes_learn_nothing():
  boxes = np.float32([[[-0.5, 0.25, 0.5, 0.75], [0.2, 0.2, 0.2, 0.2]]])
  found = np.asarray(glimpse(PICTURE + 1, boxes, CELLS, zoom=1.0))
  assert (found[0, 0, :, :3] == 0).all() and (found[0, 0, :, 3:] > 0.9).all()
  assert np.isfinite(found).all() and (found[0, 1] > 0.9).all()  # of a box without area: a point
  gradient = jax.grad(lambda b: glimpse(PICTURE, b, CELLS).sum())(boxes)
  assert (np.asarray(gradient) == 0).all()


def test_padding_is_as_far_away_as_the_edge_of_the_picture():
  padded = np.pad(PICTURE, ((0, 0), (0, 8), (0, 24), (0, 0)), constant_values=7)
  boxes = np.float32([[[0.1, 0.6, 0.5, 1.0], [0.8, 0.2, 1.1, 0.9]]])
  smaller = boxes * np.float32([WIDTH / 80, HEIGHT / 48] * 2)
  found = glimpse(padded, smaller, CELLS, extent=np.array([[HEIGHT, WIDTH]]))
  np.testing.assert_allclose(found, glimpse(PICTURE, boxes, CELLS), atol=1e-5)
