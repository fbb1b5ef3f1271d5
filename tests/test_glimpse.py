"""Pixels that a query samples around its box, against Pillow and PyTorch."""

import jax
import numpy as np
from PIL import Image
import pytest
import torch

from xmodal.models.detector.glimpse import glimpse

HEIGHT, WIDTH, CELLS = 40, 56, 6
PICTURE = np.random.default_rng(0).random((1, HEIGHT, WIDTH, 1)).astype(np.float32)


# Box sizes in pixels: below one per cell, and one, two or four per cell.
@pytest.mark.parametrize('side, shrink', [(3.0, 1), (7.5, 1), (11.0, 2), (30.0, 4)])
def test_it_is_the_picture_around_the_box_shrunk_till_a_pixel_is_a_cell(side, shrink):
  rng = np.random.default_rng(int(side))
  low = rng.uniform(0, [WIDTH - side, HEIGHT - side], (5, 2))
  middle, half = low + side / 2, side / 2 / 1.4
  boxes = np.concatenate([(middle - half) / [WIDTH, HEIGHT], (middle + half) / [WIDTH, HEIGHT]], -1)
  found = glimpse(PICTURE, np.float32(boxes)[None], CELLS, zoom=1.4)
  small = np.asarray(Image.fromarray(PICTURE[0, ..., 0]).reduce(shrink))
  cells = (np.arange(CELLS) + 0.5) / CELLS
  for crop, (left, top) in zip(found[0], low):
    x, y = np.meshgrid(2 * (left + side * cells) / WIDTH - 1, 2 * (top + side * cells) / HEIGHT - 1)
    expected = torch.nn.functional.grid_sample(
        torch.tensor(small)[None, None], torch.tensor(np.float32(np.stack([x, y], -1)))[None],
        padding_mode='border', align_corners=False)
    np.testing.assert_allclose(crop[..., 0], expected[0, 0], atol=1e-5)


def test_beyond_the_picture_there_is_nothing_and_boxes_learn_nothing():
  boxes = np.float32([[[-0.5, 0.25, 0.5, 0.75], [0.2, 0.2, 0.2, 0.2]]])
  found = np.asarray(glimpse(PICTURE + 1, boxes, CELLS, zoom=1.0))
  assert (found[0, 0, :, :3] == 0).all() and (found[0, 0, :, 3:] > 0.9).all()
  assert np.isfinite(found).all() and (found[0, 1] > 0.9).all()  # a box without area is a point
  gradient = jax.grad(lambda b: glimpse(PICTURE, b, CELLS).sum())(boxes)
  assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize('picture', [PICTURE, PICTURE[:, :39, :53]])  # edges within halved pixels
def test_padding_is_as_far_away_as_the_edge_of_the_picture(picture):
  height, width = picture.shape[1:3]
  padded = np.pad(picture, ((0, 0), (0, 48 - height), (0, 80 - width), (0, 0)), constant_values=7)
  boxes = np.float32([[[0.1, 0.6, 0.5, 1.0], [0.8, 0.2, 1.1, 0.9], [0.0, 0.0, 1.0, 1.0]]])
  smaller = boxes * np.float32([width / 80, height / 48] * 2)
  found = glimpse(padded, smaller, CELLS, extent=np.array([[height, width]]))
  np.testing.assert_allclose(found, glimpse(picture, boxes, CELLS), atol=1e-5)
