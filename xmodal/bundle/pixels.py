"""Pictures as the model saw them in training, with Pillow and numpy alone.

Decoding is Pillow's; the resize equals that of training (OpenCV) to the bit. A bundle holds a copy
of this file beside model.py.
"""

import io
import os
import sys

import numpy as np
from PIL import Image

if __package__:
  from .files import BundleError
else:
  from files import BundleError

MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> whether to reverse rows, to reverse columns, to transpose afterwards.
_UPRIGHT = {1: (False, False, False), 2: (False, True, False), 3: (True, True, False),
            4: (True, False, False), 5: (False, False, True), 6: (True, False, True),
            7: (True, True, True), 8: (False, True, True)}


def decode(picture, size, behind='white'):
  """(pixels as stored, extent of the picture within them, stored size, EXIF orientation).

  A picture that has been decoded before has the same as its attribute `decoded`.
  """
  if hasattr(picture, 'decoded'):
    return picture.decoded[:4]
  if isinstance(picture, np.ndarray):
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
      raise BundleError(f'image: an array of {picture.dtype} {list(picture.shape)}; wanted uint8 '
                        '[height, width, 3]')
    return picture, picture.shape[:2], picture.shape[:2], 1
  name = os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else 'image'
  try:
    if not isinstance(picture, Image.Image):
      picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else name)
    stored, extent = picture.size[::-1], None
    if stored[0] * stored[1] > MAX_PIXELS:
      raise BundleError(f'{name}: {stored[1]}x{stored[0]} pixels; wanted at most {MAX_PIXELS:,}')
    turn = picture.getexif().get(_ORIENTATION, 1)
    turn = turn if turn in _UPRIGHT else 1
    if picture.format == 'JPEG' and picture.mode in ('L', 'RGB'):
      wanted = size[::-1] if turn >= 5 else size
      for part in (8, 4, 2):  # libjpeg skips the finest detail of larger pictures
        if all(side / part == w or side / part > w + 0.5 for side, w in zip(stored, wanted)):
          picture.draft(picture.mode, (stored[1] // part, stored[0] // part))
          extent = tuple(side / part for side in stored)
          break
    pixels = _to_rgb(picture, behind)
    return pixels, extent or pixels.shape[:2], stored, turn
  except BundleError:
    raise
  except OSError as error:
    raise BundleError(f'{name}: cannot be read ({error.strerror or "damaged, or no picture"}); '
                      'wanted a picture that Pillow opens') from error
  except Exception as error:  # decoders raise exceptions of many types
    raise BundleError(f'{name}: damaged or unsupported picture ({" ".join(str(error).split())})'
                      ) from error


def _to_rgb(picture, behind):
  if picture.mode == 'F' or picture.mode.startswith('I'):  # grey of more than 8 bits
    grey = np.asarray(picture).astype(np.float64)
    valued = np.abs(grey) < 1e20  # the rest is black
    low, high = grey[valued].min(), grey[valued].max()
    if picture.mode != 'F' and low >= 0 and high <= 65535:
      low, high = 0, next(2 ** bits - 1 for bits in (8, 10, 12, 16) if high < 2 ** bits)
    grey = np.where(valued, np.rint((np.where(valued, grey, low) - low) * (
        255 / max(high - low, 1e-12))), 0).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
  if picture.has_transparency_data:
    picture = picture.convert('RGBA')
    picture = Image.alpha_composite(Image.new('RGBA', picture.size, behind), picture)
  return np.asarray(picture.convert('RGB'))


def upright_size(decoded):
  return decoded[2][::-1] if _UPRIGHT[decoded[3]][2] else decoded[2]


def fit(decoded, size, keep_aspect):
  """(uint8 [*size, 3], extent of the picture, its placement (width, height, across, down))."""
  pixels, extent, _, turn = decoded
  height, width = upright = upright_size(decoded)
  room = size
  if keep_aspect:
    scale = min(most / side for side, most in zip(upright, size))
    room = tuple(min(max(round(side * scale), 1), most) for side, most in zip(upright, size))
  rows, columns, swap = _UPRIGHT[turn]
  resized = _resize(pixels, extent, room[::-1] if swap else room)
  resized = resized[::-1 if rows else 1, ::-1 if columns else 1]
  out = np.zeros((*size, 3), np.uint8)
  out[:room[0], :room[1]] = resized.swapaxes(0, 1) if swap else resized
  return out, room, (width, height, room[1] / size[1] / width, room[0] / size[0] / height)


def _resize(pixels, extent, size):
  """xmodal.data.pictures.resize in numpy, equal to the bit (to OpenCV's INTER_AREA and so on)."""
  pixels = pixels[:round(extent[0]), :round(extent[1])]
  boxes, sides = zip(*map(_box_and_taps, extent, size))
  if boxes != tuple(extent):
    pixels = _scale(pixels, extent, boxes, True)
  if any(sides):
    pixels = _three_taps(pixels, sides)
  return _scale(pixels, boxes, size, False)


def _box_and_taps(length, target):
  """(length after the box means, outer weight of a filter of three taps) of one side."""
  shrink = length / target
  if length > 2 * target + 0.5:
    return 2 * target, (4 / 6 - 1 / 6 - 1 / 12) / 2
  if shrink < 1.17:
    return length, 0.0
  return length, ((shrink**2 - 1) / 12 + (shrink - 1) / (3 * shrink - 2)) / 2


def _scale(pixels, extent, size, area):
  inverse = [target / length for target, length in zip(size, extent)]
  out = tuple(round(n * factor) for n, factor in zip(pixels.shape, inverse))
  if out == pixels.shape[:2]:
    return pixels
  steps = [1 / factor for factor in inverse]
  if not area and steps != [2, 2]:
    return _linear(pixels, out, steps)
  whole = [round(step) for step in steps]
  if any(abs(step - n) >= sys.float_info.epsilon for step, n in zip(steps, whole)):
    return _area(pixels, out, steps)
  (rows, columns), (height, width) = whole, out
  total = pixels[:height * rows, :width * columns].astype(np.int32).reshape(
      height, rows, width, columns, 3).sum((1, 3))
  if whole == [2, 2]:
    return ((total + 2) >> 2).astype(np.uint8)
  return np.rint(total.astype(np.float32) * np.float32(1 / (rows * columns))).astype(np.uint8)


def _area(pixels, out, steps):
  """Means over boxes of fractional size, in OpenCV's order of float32 sums."""
  for axis in (1, 0):
    length, step = pixels.shape[axis], steps[axis]
    start = np.arange(out[axis]) * step
    end, cell = start + step, np.minimum(step, length - start)
    last = np.minimum(np.floor(end), length - 1)
    first = np.minimum(np.ceil(start), last)
    taps = [(first - 1, np.where(first - start > 1e-3, (first - start) / cell, 0))]
    taps += [(first + k, np.where(first + k < last, 1 / cell, 0))
             for k in range(int((last - first).max()))]
    taps += [(last, np.where(end - last > 1e-3, np.minimum(np.minimum(end - last, 1), cell) / cell,
                             0))]
    total, shape = np.float32(0), [-1 if i == axis else 1 for i in range(3)]
    for place, weight in taps:
      total = total + np.take(pixels, place.astype(int).clip(0, length - 1), axis).astype(
          np.float32) * weight.astype(np.float32).reshape(shape)
    pixels = total
  return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _linear(pixels, out, steps):
  """Bilinear interpolation in OpenCV's fixed point."""
  places, weights = [], []
  for axis in (0, 1):
    at = ((np.arange(out[axis]) + 0.5) * steps[axis] - 0.5).astype(np.float32)
    low, most = np.floor(at).astype(int), pixels.shape[axis] - 1
    share = at - low.astype(np.float32)
    if axis:
      share = np.where((low < 0) | (low >= most), np.float32(0), share)
      low = low.clip(0, most)
    places.append([low.clip(0, most), (low + 1).clip(0, most)])
    weights.append([np.rint(one * np.float32(2048)).astype(np.int32).reshape(-1, *[1] * (2 - axis))
                    for one in (1 - share, share)])
  x = sum(np.take(pixels, place, 1).astype(np.int32) * w for place, w in zip(places[1], weights[1]))
  x = sum((np.take(x, place, 0) >> 4) * w >> 16 for place, w in zip(places[0], weights[0]))
  return ((x + 2) >> 2).clip(0, 255).astype(np.uint8)


def _three_taps(pixels, sides):
  """Filters by (side, 1 - 2 side, side) along each axis, in OpenCV's fixed point."""
  x = pixels.astype(np.int32)
  for axis, side in enumerate(sides):
    outer, at = round(side * 256), np.arange(x.shape[axis])
    x = (np.take(x, np.maximum(at - 1, 0), axis) + np.take(x, np.minimum(at + 1, at[-1]), axis)
         ) * outer + x * (256 - 2 * outer)
  return ((x + (1 << 15)) >> 16).astype(np.uint8)
