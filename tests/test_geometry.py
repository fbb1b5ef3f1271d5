"""Boxes follow their pictures through every resize, crop, turn and padding."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps
import pytest
import torch

from xmodal.data import pipeline
from xmodal.data.example import Example, Object
from xmodal.data.pictures import images
from xmodal.data.pictures.augmentation import Augmentation, Placement
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.pictures.placement import LEAST_VISIBLE, visible_objects

EVERYTHING = Augmentation(mirror=True, zoom=0.4, crop=0.4, flip=True)


class Told:
  """A task that returns its inputs."""

  def __init__(self):
    self.given = []

  def encode(self, example, placement):
    self.given.append((example, placement))
    return {}


def maker(source, augmentation=None, size=(48, 64), **options):
  return pipeline.BatchMaker(source, {'task': Told()}, size,
                             pipeline.BadPictures(len(source), 0.0), augmentation, **options)


# Boxes against pixels


def a_white_box(rng, orientation, kind):
  """A stored black picture with a white box, and the box (x, y, w, h) as it lies upright.

  Pillow turns the picture upright and the box is looked up in its pixels.
  """
  height, width = rng.integers(40, 400, 2)
  w, h = (int(side * rng.uniform(0.2, 0.35)) for side in (width, height))
  x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[y:y + h, x:x + w] = 255
  exif = Image.Exif()
  exif[0x0112] = orientation

  def saved(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()

  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(saved('PNG'))))
  x0, y0, x1, y1 = find_white(np.asarray(upright))
  return saved(kind, **({'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {})), (
      x0, y0, x1 - x0, y1 - y0)


def find_white(pixels):
  """(x0, y0, x1, y1) of the pixels that are more white than black, None if there are none."""
  rows, columns = np.nonzero(pixels.min(-1) > 127)
  if not rows.size:
    return None
  return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize('keep_aspect', [False, True])
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_a_box_lies_where_its_pixels_are(kind, keep_aspect):
  """Within the half pixel of measurement error, and without drift to any side."""
  rng = np.random.default_rng(0)
  errors, gone, told = [], 0, Told()
  for number in range(160):
    data, box = a_white_box(rng, 1 + number % 8, kind)
    make = dataclasses.replace(
        maker([Example(data, objects=(Object('box', box),))], EVERYTHING, keep_aspect=keep_aspect),
        tasks={'task': told})
    found = find_white(make(np.zeros(1, int), np.array([number]))['image'][0])
    example, placement = told.given.pop()
    (expected,), (left,) = placement.visible([o.box for o in example.objects])
    expected = expected * (64, 48, 64, 48)
    if left == 0:
      assert found is None
      gone += 1
    elif (expected[2:] - expected[:2]).min() >= 3:  # less is blurred away
      errors.append(found - expected)
  assert len(errors) > 100 and gone
  # A JPEG decoded at a half or less blurs the edge.
  assert np.abs(errors).max() <= (0.51 if kind == 'PNG' else 0.6)
  assert np.abs(np.mean(errors, 0)).max() < 0.07


# Boxes against algebra


def random_case(rng):
  """(height, width), the crop, its placement, the input's size, the two orientations."""
  size, input_size = rng.integers(20, 3000, 2), rng.integers(16, 400, 2)
  sides = rng.uniform(0.1, 1, (2, 2))  # of the picture and of the input; a crop leaves a tenth
  starts = rng.uniform(0, 1 - sides)
  part, area = (np.concatenate([start, start + side]) * np.tile(whole[::-1], 2)
                for start, side, whole in zip(starts, sides, (size, input_size)))
  turns = dict(zip(('mirrored', 'flipped'), rng.random(2) < 0.5))
  return tuple(map(int, size)), tuple(part), tuple(area), tuple(map(int, input_size)), turns


def random_boxes(rng, size, count=7):
  corners = np.sort(rng.uniform(0, 1, (count, 2, 2)) * size[::-1], axis=1)
  return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)


def steps(part, area, input_size, mirrored, flipped):
  """The same map as a product of 3x3 matrices: crop, resize, turn, place, scale to 0..1."""
  def scale(x, y):
    return torch.diag(torch.tensor([x, y, 1], dtype=torch.float64))

  def shift(x, y):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, 2] = torch.tensor([x, y])
    return matrix

  (x0, y0, x1, y1), (left, top, right, bottom) = part, area
  chain = [shift(-x0, -y0), scale((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))]
  if mirrored:
    chain += [scale(-1, 1), shift(right - left, 0)]
  if flipped:
    chain += [scale(1, -1), shift(0, bottom - top)]
  chain += [shift(left, top), scale(1 / input_size[1], 1 / input_size[0])]
  return torch.linalg.multi_dot(chain[::-1])


@pytest.mark.parametrize('seed', range(20))
def test_boxes_are_those_of_a_chain_of_matrices(seed):
  rng = np.random.default_rng(seed)
  size, part, area, input_size, turns = random_case(rng)
  boxes = random_boxes(rng, size)
  found = Placement.of_part(size, part, area, input_size, **turns).boxes(boxes)
  corners = torch.tensor(np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
  corners = torch.cat([corners, torch.ones(*corners.shape[:2], 1, dtype=torch.float64)], -1)
  mapped = (corners @ steps(part, area, input_size, **turns).T)[..., :2].sort(1).values
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, mapped.reshape(-1, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize('seed', range(20))
def test_boxes_come_back_to_the_thousandth_of_a_pixel(seed):
  rng = np.random.default_rng(seed)
  size, part, area, input_size, turns = random_case(rng)
  placement = Placement.of_part(size, part, area, input_size, **turns)
  boxes = random_boxes(rng, size)
  np.testing.assert_allclose(placement.pixels(placement.boxes(boxes)), boxes, atol=1e-3)
  # Predicted boxes may extend beyond the picture.
  wild = rng.normal(0.5, 2, (50, 2, 2))
  x, y, w, h = placement.pixels(np.sort(wild, axis=1).reshape(-1, 4)).T
  assert min(x.min(), y.min(), w.min(), h.min()) >= 0
  assert (x + w).max() <= size[1] + 1e-9 and (y + h).max() <= size[0] + 1e-9


def test_the_share_that_is_seen_is_that_of_painted_boxes():
  rng = np.random.default_rng(0)
  for _ in range(30):
    size = tuple(map(int, rng.integers(30, 60, 2)))
    x0, x1 = np.sort(rng.choice(size[1] + 1, 2, replace=False)).tolist()
    y0, y1 = np.sort(rng.choice(size[0] + 1, 2, replace=False)).tolist()
    placement = Placement.of_part(size, (x0, y0, x1, y1), (3, 2, 20, 30), (32, 48), mirrored=True)
    x, y, w, h = box = *rng.integers(0, np.array(size[::-1]) - 9), *rng.integers(1, 10, 2)
    painted = np.zeros(size)
    painted[y:y + h, x:x + w] = 1
    (seen,), (share,) = placement.visible([box])
    visible = painted[y0:y1, x0:x1]
    np.testing.assert_allclose(share, visible.sum() / painted.sum(), atol=1e-6)
    window = np.array([3 / 48, 2 / 32, 20 / 48, 30 / 32])
    np.testing.assert_allclose((seen[2:] - seen[:2]).prod() / (window[2:] - window[:2]).prod(),
                               visible.mean(), atol=1e-5)


def test_an_object_that_a_crop_leaves_little_of_is_gone():
  placement = Placement.of_part((100, 100), (50, 0, 100, 100), (0, 0, 32, 32), (32, 32))
  sides = (LEAST_VISIBLE - 0.01, LEAST_VISIBLE + 0.01)
  objects = [Object(f'{side}', (50 - 40 * (1 - side), 10, 40, 40)) for side in sides]
  crowd = dataclasses.replace(objects[0], name='crowd', ignore=True)
  kept, boxes = visible_objects([*objects, crowd, Object('off', (0, 0, 40, 40))], placement)
  assert kept == [objects[1], crowd]
  np.testing.assert_allclose(boxes[0], [0, 0.1, 40 * sides[1] / 50, 0.5], atol=1e-6)
  assert visible_objects((), placement)[1].shape == (0, 4)


# Pictures that keep their aspect ratio


@pytest.mark.parametrize('shape', [(30, 60), (60, 30), (480, 640), (7, 300), (48, 48), (500, 3)])
def test_a_picture_keeps_its_ratio_at_the_top_left(shape):
  rng = np.random.default_rng(0)
  picture = rng.integers(1, 255, (*shape, 3)).astype(np.uint8)
  batch = maker([Example(picture)], keep_aspect=True)(np.zeros(1, int), np.zeros(1, int))
  width, height = ImageOps.contain(Image.fromarray(picture), (64, 48)).size
  width = max(width, 1)  # Pillow leaves nothing of the thinnest
  assert batch['extent'].dtype == np.int32 and batch['extent'].tolist() == [[height, width]]
  image = batch['image'][0].copy()
  np.testing.assert_array_equal(
      image[:height, :width], images.load_image(picture, (height, width))[0])
  image[:height, :width] = 0
  assert not image.any()


def test_zoom_stays_in_the_room_that_the_ratio_gives():
  picture = np.full((30, 60, 3), 200, np.uint8)
  make = maker([Example(picture)], Augmentation(zoom=0.5, light=0.2), keep_aspect=True)
  batch = make(np.zeros(20, int), np.arange(20))
  assert (batch['extent'] == (32, 64)).all() and not batch['image'][:, 32:].any()
  levels = batch['image'][:, 0, 0, 0]
  assert len(set(levels.tolist())) > 5 and (picture == 200).all()
  assert (batch['image'][:, :32] == levels.reshape(20, 1, 1, 1)).all()
  light = maker([Example(picture)], Augmentation(light=0.2), keep_aspect=True)
  image, = light(np.zeros(1, int), np.zeros(1, int))['image']
  assert (image[:32] == image[0, 0]).all() and 0 < image[0, 0, 0] != 200 and not image[32:].any()
  windows = np.array([placement.window for _, placement in make.tasks['task'].given])
  assert len(np.unique(windows, axis=0)) == 20 and windows[:, 3].max() <= 32 / 48 + 1e-9


def test_what_cannot_be_read_or_must_not_be_seen_has_no_shape():
  picture = np.full((10, 60, 3), 200, np.uint8)
  source = [Example(picture), Example(b'rubbish')]
  make = maker(source, keep_aspect=True)
  make = dataclasses.replace(make, bad=pipeline.BadPictures(2, 0.5))
  batch = make(np.array([0, 1, -1]), np.zeros(3, int))
  assert batch['extent'].tolist() == [[11, 64], [48, 64], [11, 64]]
  assert batch['valid'].tolist() == [True, False, False]
  blank = dataclasses.replace(make, blank='image')(np.zeros(1, int), np.zeros(1, int))
  assert blank['extent'].tolist() == [[48, 64]]
  assert 'extent' not in maker(source)(np.zeros(1, int), np.zeros(1, int))


# Crops


def test_a_crop_is_the_part_that_its_placement_tells(tmp_path):
  """Against Pillow: decode in full, turn upright, crop, resize."""
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:300, :421]
  waves = [np.sin(rows / 19 + c) * np.cos(columns / 23 - c) for c in range(3)]
  stored = Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))
  decode = KeepDecoded(10**8)
  for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f'{orientation}.jpg')
    stored.save(path, quality=95, exif=exif)
    make = maker([Example(path)], Augmentation(crop=0.6), decode=decode,
                 keep_aspect=bool(orientation % 2))
    batch = make(np.zeros(3, int), rng.integers(0, 10**6, 3))
    upright = ImageOps.exif_transpose(Image.open(path))
    for i, (_, placement) in enumerate(make.tasks['task'].given):
      height, width = batch['extent'][i] if make.keep_aspect else (48, 64)
      (x, y, w, h), = placement.pixels([placement.window])
      assert 0.4 * upright.width <= w <= upright.width
      assert 0.4 * upright.height <= h <= upright.height
      expected = upright.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + w, y + h))
      difference = np.abs(batch['image'][i, :height, :width].astype(int) - np.asarray(expected))
      assert difference.mean() < 1.5 and difference.max() < 12
      if make.keep_aspect:
        assert abs(w / h * height - width) <= max(0.5, 0.5 * w / h) + 1e-6


def test_a_crop_has_the_sharpness_of_a_whole_picture(tmp_path):
  """Stripes of 6 pixels vanish if a picture is decoded just large enough for an uncropped input."""
  stripes = np.zeros((1024, 1024, 3), np.uint8)
  stripes[:, np.arange(1024) // 6 % 2 == 0] = 255
  Image.fromarray(stripes).save(tmp_path / 'a.jpg', quality=95)
  make = maker([Example(str(tmp_path / 'a.jpg'))], Augmentation(crop=0.9), (64, 64))
  batch = make(np.zeros(20, int), np.arange(20))
  contrast = {}
  for image, (_, placement) in zip(batch['image'], make.tasks['task'].given):
    contrast[1 / placement.across / 1024] = image[32].astype(float).std()
  narrowest = min(contrast)
  assert narrowest < 0.2 and contrast[narrowest] > 60, contrast


def visits(changes, example, count=60):
  """The inputs from repeated visits to an example."""
  return maker([example], changes, (16, 16))(np.zeros(count, int), np.arange(count))['image']


def half_white(**texts):
  pixels = np.zeros((16, 16, 3), np.uint8)
  pixels[:8] = 255
  return Example(pixels, **texts)


THING = Object('cat', (2, 2, 5, 5))


def test_only_pictures_without_texts_are_cropped():
  def cropped(**texts):
    inputs = visits(Augmentation(crop=0.5), half_white(**texts))
    return any((image != inputs[0]).any() for image in inputs)

  assert cropped() and cropped(objects=(THING,))
  for texts in (dict(question='what?'), dict(answers=('cat',)), dict(captions=('a cat',)),
                dict(number=0.0), dict(expression=THING), dict(reason='It is a cat.')):
    assert not cropped(**texts), texts


def test_pictures_are_turned_upside_down_half_the_time_unless_a_text_forbids_it():
  def share(**texts):
    return (visits(Augmentation(flip=True), half_white(**texts), 200)[:, 0, 8, 0] == 0).mean()

  assert 0.4 < share() < 0.6
  assert 0.4 < share(question='is the leftmost cup a group?', answers=('yes',)) < 0.6
  for text in ('what is above the cat?', 'the bottommost one', 'upside down', 'which is on top?',
               'Is it under the bed?', 'what does the sign say?', 'turned clockwise', 'lower lobe'):
    assert share(question=text) == share(captions=(text,)) == 0, text
    assert share(expression=dataclasses.replace(THING, name=text)) == 0, text


def test_an_expression_guards_like_any_other_text():
  def changes(name, **kind):
    example = half_white(expression=dataclasses.replace(THING, name=name))
    example.image[:, :8] //= 2
    return len({image.tobytes() for image in visits(Augmentation(**kind), example)}) > 1

  for kind, name in ((dict(mirror=True), 'the cat on the left'), (dict(zoom=0.5), 'the big cat'),
                     (dict(light=0.3), 'the cat in the dark')):
    assert changes('the red cat', **kind) and not changes(name, **kind)


# Boxes that are not inside their pictures


def test_bad_boxes_are_cut_or_left_out_and_reported_once():
  picture = np.zeros((30, 40, 3), np.uint8)
  good, rounded = Object('good', (0, 0, 40, 30)), Object('rounded', (35.2, 3, 5.2, 5))
  out, flat = Object('out', (41, 3, 5, 5)), Object('flat', (3, 3, 0, 5))
  beyond = Object('beyond', (-4, 20, 10, 15))
  source = [Example(picture, objects=(good,)), Example(picture, objects=(good, rounded)),
            Example(picture, objects=(out, good, beyond, flat)),
            Example(picture, expression=out), Example(picture, expression=good, objects=())]
  make = maker(source)
  for position in (0, 5):
    make(np.array([0, 1, 2, 3, 4, -1]), np.arange(6) + position)
  given = [example for example, _ in make.tasks['task'].given[-6:]]
  assert given[0] is source[0] and given[4] is source[4]
  np.testing.assert_allclose(given[1].objects[1].box, (35.2, 3, 4.8, 5))
  assert [(o.name, o.box) for o in given[2].objects] == [
      ('good', (0, 0, 40, 30)), ('beyond', (0, 20, 6, 10))]
  assert given[3].expression is None and given[3].objects is None
  assert list(make.bad_boxes.of_record) == [2, 3]
  lines = make.bad_boxes.lines()
  assert len(lines) == 4 and lines[0] == (
      'record 2, pixels: objects 1 has box [41, 3, 5, 5] outside the picture, wanted '
      '[x, y, width, height] inside 40 x 30')
  assert 'objects 3 has box [-4, 20, 10, 15] outside' in lines[1]
  assert 'objects 4 has box [3, 3, 0, 5] without area' in lines[2] and 'expression' in lines[3]
