"""Turns any picture into pixels, in the same way for training, evaluation and predict."""

from collections.abc import Sequence
import io
import math
import os
from typing import NamedTuple
import warnings

import cv2
import numpy as np
from PIL import Image
import simplejpeg

from xmodal import storage
from xmodal.data.example import Packed
from xmodal.data.pictures import deep_grey
from xmodal.data.pictures.resize import resize_antialiased
from xmodal.errors import UserError

# Callers load many pictures in parallel; OpenCV's own threads inside each call
# would only compete with them.
cv2.setNumThreads(0)

# Largest picture that any reader accepts; larger ones count as unreadable. Pillow's own limit, at
# which it suspects a decompression bomb.
MAX_PIXELS = 178_956_970
# By default Pillow warns at half of it. With this setting it only refuses twice this size.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112  # the EXIF tag
_JPEG = b'\xff\xd8\xff'  # beginning of the file
_HEADER_BYTES = 2**16

# EXIF orientation -> how to turn the stored pixels upright (EXIF 2.32, table 6): whether to reverse
# rows, whether to reverse columns, and whether to transpose afterwards.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}


class SideBySide(str):
  """The paths of two pictures that are decoded as one: the second is to the right of the first.

  Both are scaled to the smaller of their heights. The text names both files.
  """

  paths: tuple[str, str]

  def __new__(cls, left: str, right: str):
    self = super().__new__(cls, f'{left} + {right}')
    self.paths = left, right
    return self

  def __getnewargs__(self):  # for pickle
    return self.paths


def load_image(
    source: str | os.PathLike | bytes | Packed | np.ndarray,
    size: tuple[int, int],
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
  """Reads a picture, turns it upright and resizes it, without keeping the aspect ratio.

  Reads every format that Pillow opens, up to MAX_PIXELS; only the first frame.
  Colour profiles are ignored. Transparent parts become white. Grey of more than
  8 bits is scaled as described in xmodal.data.pictures.deep_grey. Thread-safe; threads
  run in parallel.

  Args:
    source: path or address of a picture file, its bytes, a Packed one, or uint8 pixels [H, W, 3].
    size: target (height, width) in pixels.
    out: uint8 [height, width, 3] to write to, such as one row of a batch.

  Returns:
    uint8 pixels [height, width, 3], red, green, blue (`out` if given), resized
    by `resize_antialiased`; and the upright picture's original (height, width),
    which boxes in pixels refer to.

  Raises:
    UserError: no such file, not a picture, damaged or truncated, more than
      MAX_PIXELS, grey in which no pixel has a value, or an array of another
      shape or dtype.
  """
  return fit(decode(source, size), size, out)


def load_within(source: str | os.PathLike | bytes | Packed | np.ndarray,
                longest: int) -> tuple[np.ndarray, tuple[int, int]]:
  """As `load_image`, but keeps the aspect ratio: the longer side has at most `longest` pixels."""
  picture = decode(source, (longest, longest))
  height, width = picture.stored_size[::-1 if picture.orientation >= 5 else 1]
  factor = min(1.0, longest / max(height, width))
  return fit(picture, (max(1, round(height * factor)), max(1, round(width * factor))))


class Decoded(NamedTuple):
  """A picture before it is turned upright.

  Attributes:
    pixels: uint8 [H, W, 3].
    extent: (height, width) of the picture within `pixels`. May be fractional: a JPEG
      side of 555 decoded at 1/2 gives 278 pixels, the last of them half outside.
    stored_size: (height, width) as stored.
    orientation: EXIF orientation, 1 to 8.
    note: note for the user on an unusual way the pixels were read; mostly ''.
  """

  pixels: np.ndarray
  extent: tuple[float, float]
  stored_size: tuple[float, float]
  orientation: int
  note: str = ''

  @property
  def size(self) -> tuple[float, float]:
    """(height, width) of the picture turned upright, in stored pixels."""
    return self.stored_size[::-1] if _UPRIGHT[self.orientation][2] else self.stored_size


def decode(source: str | os.PathLike | bytes | Packed | np.ndarray, size: tuple[int, int],
           behind: str = 'white') -> Decoded:
  """The first half of `load_image`: decodes a picture at no less than the target (height, width).

  `behind` is the background colour of transparent parts, 'white' or 'black'.
  """
  if isinstance(source, np.ndarray):
    return Decoded(_checked(source), source.shape[:2], source.shape[:2], 1)
  if isinstance(source, SideBySide):
    return _joined([decode(path, size, behind) for path in source.paths])
  data, name = read_bytes(source)
  return _decode_plain_jpeg(data, size, name) or _decode(data, name, behind)


def from_pillow(image: Image.Image, behind: str = 'white') -> np.ndarray:
  """uint8 [H, W, 3] of a picture that Pillow holds: turned upright, see `decode` for the rest."""
  picture = _pixels_of(image, 'image', behind)
  return fit(picture, picture.size)[0]


def crop(
    picture: Decoded, window: tuple[float, float, float, float]
) -> tuple[Decoded, tuple[float, float, float, float]]:
  """Crops a picture at boundaries of decoded pixels, without copying them.

  Args:
    picture: the picture.
    window: (x0, y0, x1, y1), shares of the upright picture's width and height.

  Returns:
    The crop, whose stored_size may be fractional, and its box (x0, y0, x1, y1)
    in stored pixels of the upright picture: `window` extended outwards to the
    next decoded pixel.
  """
  *reverse, swap = _UPRIGHT[picture.orientation]
  x0, y0, x1, y1 = window
  shares = ((x0, x1), (y0, y1)) if swap else ((y0, y1), (x0, x1))  # of rows and columns as stored
  cuts = [_cut(side, backwards, length)
          for side, backwards, length in zip(shares, reverse, picture.extent)]
  scales = [stored / length for stored, length in zip(picture.stored_size, picture.extent)]
  extent = tuple(stop - start for start, stop in cuts)
  part = Decoded(picture.pixels[tuple(slice(start, math.ceil(stop)) for start, stop in cuts)],
                 extent, tuple(e * scale for e, scale in zip(extent, scales)), picture.orientation)
  sides = [(stored - stop * scale, stored - start * scale) if backwards
           else (start * scale, stop * scale)
           for (start, stop), scale, stored, backwards in zip(
               cuts, scales, picture.stored_size, reverse)]
  (y0, y1), (x0, x1) = sides[::-1] if swap else sides
  return part, (x0, y0, x1, y1)


def _cut(share, backwards, length):
  """The decoded pixels (start, stop) that hold a share (low, high) of a side, perhaps reversed."""
  low, high = (1 - share[1], 1 - share[0]) if backwards else share
  start = min(int(low * length), int(length) - 1)
  return start, min(max(math.ceil(high * length), start + 1), length)


def fit(
    picture: Decoded, size: tuple[int, int], out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
  """The second half of `load_image`: turns upright and resizes to (height, width)."""
  if out is None:
    out = np.empty((*size, 3), np.uint8)
  pixels, extent, _, orientation, _ = picture
  if orientation == 1:
    return resize_antialiased(pixels, size, extent, out), picture.size
  # Rotating is cheaper after the resize.
  reverse_rows, reverse_columns, swap = _UPRIGHT[orientation]
  resized = resize_antialiased(pixels, size[::-1] if swap else size, extent)
  resized = resized[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]
  out[...] = resized.swapaxes(0, 1) if swap else resized
  return out, picture.size


def size_within(size: tuple[float, float], room: tuple[int, int]) -> tuple[int, int]:
  """The largest (height, width) in whole pixels with the aspect ratio of `size` within `room`."""
  scale = min(most / side for side, most in zip(size, room))
  return tuple(min(max(round(side * scale), 1), most) for side, most in zip(size, room))


def _joined(pictures: Sequence[Decoded]) -> Decoded:
  """Several pictures as one, from left to right, scaled to the smallest of their heights."""
  height = math.ceil(min(p.extent[_UPRIGHT[p.orientation][2]] for p in pictures))
  widths = (max(1, round(p.size[1] / p.size[0] * height)) for p in pictures)
  pixels = np.hstack([fit(p, (height, width))[0] for p, width in zip(pictures, widths)])
  return Decoded(pixels, pixels.shape[:2], pixels.shape[:2], 1,
                 '; '.join(filter(None, (p.note for p in pictures))))


def _checked(pixels: np.ndarray) -> np.ndarray:
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
    raise UserError(
        f'image: an array of {pixels.dtype} {list(pixels.shape)}; wanted uint8 [height, width, 3]:'
        ' convert it, or give the path of a picture file'
    )
  return pixels


def stored_size(picture: str | bytes) -> tuple[int, int] | None:
  """(width, height) of a picture turned upright, from its header alone; None if unreadable.

  Args:
    picture: path or address of the file, or its bytes.
  """
  if isinstance(picture, str) and storage.is_remote(picture):
    try:
      start = storage.read(picture, 0, _HEADER_BYTES)
      # The orientation may be at the end of files of other kinds.
      if start[:3] == _JPEG and (found := stored_size(start)):
        return found
      picture = storage.read(picture)
    except FileNotFoundError:
      return None
  try:
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
      return image.size[::-1] if _UPRIGHT[_orientation(image)][2] else image.size
  except Exception:  # decoders raise exceptions of many types; decoding reports the cause
    return None


def read_bytes(source: str | os.PathLike | bytes | Packed) -> tuple[bytes, str]:
  """The bytes of a picture file, and its name in messages; UserError if it cannot be read."""
  if isinstance(source, bytes):
    return source, 'image'
  if isinstance(source, Packed):
    return source.read(), source.name
  name = os.fspath(source)
  try:
    return storage.read(name), name
  except OSError as fault:
    reason = fault.strerror or ('no such file' if isinstance(fault, FileNotFoundError) else fault)
    raise UserError(
        f'{name}: cannot be read ({reason}); wanted a picture file: check the path'
    ) from fault


def _decode_plain_jpeg(data: bytes, size: tuple[int, int], name: str) -> Decoded | None:
  """Decodes a valid grey or colour JPEG; None for anything else.

  The same decoder as Pillow's (libjpeg-turbo) with less copying. Pictures of
  at least twice the target size are decoded at 1/2, 3/8, 1/4 or 1/8, never below
  the target: the decoder then skips the finest detail instead of averaging it.
  """
  if data[:3] != _JPEG:
    return None
  try:
    *stored_size, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None  # Unusual or damaged: Pillow decides which.
  _check_pixels(name, stored_size)
  try:
    orientation = _orientation(Image.open(io.BytesIO(data))) if _has_app1(data) else 1
    if colours not in ('Gray', 'YCbCr', 'RGB'):
      return None
    wanted = size[::-1] if orientation >= 5 else size
    for eighths in (1, 2, 3, 4):
      extent = tuple(side * eighths / 8 for side in stored_size)
      # A fractional extent needs a pixel to spare: if the number of pixels equals
      # the target, OpenCV copies them, whatever the extent.
      if all(e == w or e > w + 0.5 for e, w in zip(extent, wanted, strict=True)):
        height, width = map(math.ceil, extent)
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
        return Decoded(pixels, extent, tuple(stored_size), orientation)
    return Decoded(simplejpeg.decode_jpeg(data), *[tuple(stored_size)] * 2, orientation)
  except (ValueError, OSError):
    return None


def _has_app1(data: bytes) -> bool:
  """Whether a JPEG has an APP1 segment, where EXIF and XMP store an orientation.

  Pillow's own check costs a tenth of the decoding; most training pictures have none.
  """
  at = 2
  while data[at : at + 1] == b'\xff' and data[at + 1 : at + 2] != b'\xda':
    if data[at + 1 : at + 2] == b'\xe1':
      return True
    at += 2 + int.from_bytes(data[at + 2 : at + 4])
  return False


def _decode(data: bytes, name: str, behind: str) -> Decoded:
  """Decodes any format that Pillow opens; raises UserError for others."""
  try:
    image = Image.open(io.BytesIO(data))
  except Image.UnidentifiedImageError as fault:
    raise UserError(
        f'{name}: not a picture ({len(data)} bytes, starting {data[:8]!r}); wanted a JPEG, PNG or'
        ' other format that Pillow opens: replace the file or leave it out'
    ) from fault
  except Image.DecompressionBombError as fault:
    raise _too_large(name) from fault
  except Exception as fault:
    raise _damaged(name, fault) from fault
  return _pixels_of(image, name, behind)


def _pixels_of(image: Image.Image, name: str, behind: str) -> Decoded:
  _check_pixels(name, image.size[::-1])
  try:
    image.load()
    pixels, note = _to_rgb(image, behind)
    return Decoded(pixels, pixels.shape[:2], pixels.shape[:2], _orientation(image), note)
  except MemoryError:
    raise
  except Exception as fault:  # Decoders raise exceptions of many types on bad bytes.
    raise _damaged(name, fault) from fault


def _check_pixels(name: str, size: tuple[int, int]) -> None:
  """Raises UserError for a (height, width) of more than MAX_PIXELS."""
  if size[0] * size[1] > MAX_PIXELS:
    raise _too_large(name, f'{size[1]}x{size[0]} = {size[0] * size[1]:,} pixels, ')


def _too_large(name: str, found: str = '') -> UserError:
  return UserError(f'{name}: {found}more than the {MAX_PIXELS:,} that are read: shrink the picture '
                   'or leave it out')


def _damaged(name: str, fault: Exception) -> UserError:
  reason = ' '.join(str(fault).split()) or type(fault).__name__
  return UserError(
      f'{name}: damaged or unsupported picture ({reason}); wanted one that decodes whole:'
      ' replace the file or leave it out'
  )


def _orientation(image: Image.Image) -> int:
  """The EXIF orientation, 1 to 8; 1 (upright) if missing or invalid."""
  try:
    orientation = image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Malformed EXIF beside valid pixels is common.
    return 1
  return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image, behind: str) -> tuple[np.ndarray, str]:
  """uint8 [H, W, 3] as stored, transparent parts over `behind`; and a note, see Decoded."""
  if deep_grey.is_deep(image):
    grey, note = deep_grey.to_8_bit(image)
    if isinstance(clear := image.info.get('transparency'), int):
      grey = np.where(np.asarray(image) == clear, np.uint8(255 * (behind == 'white')), grey)
    return np.repeat(grey[..., None], 3, axis=2), note
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, behind), image)
  return np.asarray(image.convert('RGB')), ''
