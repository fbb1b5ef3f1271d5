"""Grey of more than 8 bits a pixel (X-rays, depth, elevation) as 8 bits.

The range that holds the picture is rarely stated in its file:

- Whole numbers of 0 to 65535 are scaled from 0 to the highest that their bits can hold: 8, 10 or 12
  bits if the highest value of the picture fits (cameras and scanners of 12 bits store them in 16),
  otherwise 16; or as many as a TIFF states.
- Other numbers, and those beside pixels without a value, are scaled from the lowest to the highest
  of the picture.
- Pixels without a value show black and do not count for the range: NaN, infinity, 1e20 and beyond
  (what netCDF and raster programs fill with), the number that a GeoTIFF names as nodata, and a
  customary number for it (-9999) that lies farther from all other values than those span.
"""

import numpy as np
from PIL import Image

_FILL = 1e20
# In use for 'not measured' where the file does not say so.
_CUSTOMARY = (-9999, -99999, -999, -32768, -32767, -2**31)
_GDAL_NODATA, _BITS_PER_SAMPLE, _SAMPLE_FORMAT = 42113, 258, 339  # TIFF tags
_FEW_LEVELS = 4


def is_deep(image: Image.Image) -> bool:
  """Whether Pillow opens a picture as grey of more than 8 bits."""
  return image.mode == 'F' or image.mode.startswith('I')


def to_8_bit(image: Image.Image) -> tuple[np.ndarray, str]:
  """Scales deep grey to 8 bits.

  Returns:
    uint8 [H, W], and what a person should know of how it was scaled; '' for the usual.

  Raises:
    ValueError: no pixel has a value.
  """
  grey, tags = np.asarray(image), getattr(image, 'tag_v2', {})
  if tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
    grey = grey.view(np.uint32)  # Pillow knows signed ones only
  valued = _valued(tags, grey)
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
  # Without a value that is finite the sums would be none either, and warn.
  known = grey if valued is None else np.where(valued, grey, values.flat[0])
  scaled = np.rint((known - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
  if valued is not None:
    notes.append(f'{grey.size - values.size:,} of {grey.size:,} pixels have no value (NaN, '
                 'infinite or nodata) and show black')
    scaled = np.where(valued, scaled if high > low else np.uint8(255), np.uint8(0))
  if not whole and high > low:
    notes += _squeezed(scaled, low, high)
  return scaled, '; '.join(notes)


def _valued(tags, grey):
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
  """Where pixels are the number that a text states, rounded as they are; nowhere if it is none."""
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


def _squeezed(scaled, low, high):
  """Says where a few extreme pixels leave next to no grey levels to the others."""
  counts = np.sort(np.bincount(scaled.ravel(), minlength=256))[::-1]
  if counts[0] == scaled.size or counts[:_FEW_LEVELS].sum() < 0.99 * scaled.size:
    return []
  return [f'99% of the pixels come to {_FEW_LEVELS} grey levels of 256, as the values span {low:g} '
          f'to {high:g}: is one of these no measurement?']
