"""Scales greyscale pictures of more than 8 bits a pixel (X-rays, depth, elevation) to 8 bits.

Files rarely state the range of their values, so it is inferred:

- Whole numbers of 0 to 65535 are scaled from 0 to the highest value of their bit depth: 8, 10 or 12
  bits if the picture's highest value fits (12-bit cameras and scanners store 16 bits), otherwise
  16; or the bit depth that a TIFF states.
- Other numbers, and pictures in which some pixels have no value, are scaled from the picture's
  lowest to its highest value.
- Pixels without a value become black and do not count for the range: NaN, infinity, 1e20 and beyond
  (fill values of netCDF and raster programs), the nodata number of a GeoTIFF, and a customary
  nodata number (-9999) if it is farther from all other values than those span.
"""

import numpy as np
from PIL import Image

_FILL = 1e20
# Customary numbers for 'not measured', used without being declared in the file.
_CUSTOMARY = (-9999, -99999, -999, -32768, -32767, -2**31)
_GDAL_NODATA, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 42113, 258, 339  # TIFF tags
_FEW_LEVELS = 4


def is_deep(image: Image.Image) -> bool:
  """Whether Pillow opens a picture as grey of more than 8 bits."""
  return image.mode == 'F' or image.mode.startswith('I')


def to_8_bit(image: Image.Image) -> tuple[np.ndarray, str]:
  """Scales deep grey to 8 bits.

  Returns:
    uint8 [H, W], and a note on unusual scaling for the user; '' if there is nothing to note.

  Raises:
    ValueError: no pixel has a value.
  """
  grey, tags = np.asarray(image), getattr(image, 'tag_v2', {})
  if tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
    grey = grey.view(np.uint32)  # Pillow reads them as signed
  valued = _valid_pixels(tags, grey)
  values = grey if valued is None else grey[valued]
  if not values.size:
    raise ValueError('no pixel has a value: all are NaN, infinite or nodata')
  low, high = float(values.min()), float(values.max())
  whole = (valued is None and np.issubdtype(grey.dtype, np.integer) and low >= 0
           and high <= 65535)
  bits = _bits(tags, high) if whole else 0
  notes = []
  if whole:
    low, high = 0.0, float(2 ** bits - 1)
    if bits < 16:
      notes.append(f'16 bits a pixel of which {bits} are used: scaled from 0..{2 ** bits - 1}')
  # A value that is not finite would raise a warning in the arithmetic below.
  known = grey if valued is None else np.where(valued, grey, values.flat[0])
  scaled = np.rint((known - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
  if valued is not None:
    notes.append(f'{grey.size - values.size:,} of {grey.size:,} pixels have no value (NaN, '
                 'infinite or nodata) and show black')
    scaled = np.where(valued, scaled if high > low else np.uint8(255), np.uint8(0))
  if not whole and high > low:
    notes += _compression_notes(scaled, low, high)
  return scaled, '; '.join(notes)


def _valid_pixels(tags, grey):
  """bool [H, W]: which pixels have a value; None: all."""
  valued = np.ones(grey.shape, bool)
  if grey.dtype.kind == 'f':
    valued = np.abs(grey) < _FILL  # False for NaN
  stated = tags.get(_GDAL_NODATA)
  if stated is not None:
    valued &= ~_equal(grey, stated)
  if grey.dtype.kind != 'u' and valued.any() and (lowest := grey[valued].min()) in _CUSTOMARY:
    rest = grey[valued & (grey != lowest)]
    # In float, as the difference of whole numbers may not fit into their type.
    if rest.size and float(rest.min()) - float(lowest) > float(rest.max()) - float(rest.min()):
      valued &= grey != lowest
  return None if valued.all() else valued


def _equal(grey, stated):
  """Mask of pixels equal to the number in a text, in their precision; all False if no number."""
  try:
    number = float(str(stated).strip('\0 '))
    with np.errstate(over='ignore'):
      return grey == (np.float32(number) if grey.dtype.kind == 'f' else number)
  except ValueError:
    return np.zeros(grey.shape, bool)


def _bits(tags, highest):
  stated = tags.get(_BITS_PER_SAMPLE)
  if isinstance(stated, tuple) and len(stated) == 1 and 8 < stated[0] < 16:
    return stated[0]
  return next(bits for bits in (8, 10, 12, 16) if highest < 2 ** bits)


def _compression_notes(scaled, low, high):
  """A note if a few extreme pixels leave almost no grey levels for the others; [] otherwise."""
  counts = np.sort(np.bincount(scaled.ravel(), minlength=256))[::-1]
  if counts[0] == scaled.size or counts[:_FEW_LEVELS].sum() < 0.99 * scaled.size:
    return []
  return [f'99% of the pixels fall into {_FEW_LEVELS} of 256 grey levels, because the values span '
          f'{low:g} to {high:g}: is one of these not a measurement?']
