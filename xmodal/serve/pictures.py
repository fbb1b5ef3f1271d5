"""Pictures from clients: bytes in memory, of a few safe formats and a bounded size."""

import base64
import binascii
from collections.abc import Callable
import io
import re
from typing import NamedTuple

from PIL import Image

from xmodal.data.pictures import images
from xmodal.errors import UserError
from xmodal.serve.engine import Picture
from xmodal.serve.limits import Limits, Refused, Room

# Others that Pillow opens start programs (EPS), or are not what people upload.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')
_DATA_URL = re.compile(r'data:image/[\w.+-]+;base64,', re.IGNORECASE)
_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:')
# Bytes that decoding takes for each pixel, as measured: most for a WebP with transparent parts, and
# few for a JPEG, which is decoded smaller where the model's input is small.
_BYTES, _JPEG_BYTES = 28, 10
# Encoders write up to about 15 scans, and some tens of other segments.
_MOST_SCANS, _MOST_SEGMENTS = 50, 1_000
# Of a JPEG (T.81, B.1.1): neither a zero that is filled in, nor a marker without a length.
_MARKER = re.compile(rb'\xff+([^\x00\x01\xd0-\xd7\xff])')


class Opening(NamedTuple):
  """How pictures are opened.

  Attributes:
    size: side of the model's input.
    limits: see Limits.pixels.
    hold: called with the bytes of each decoded picture; may raise Refused.
    room: memory for decoding.
  """

  size: int
  limits: Limits
  hold: Callable[[int], None]
  room: Room


def from_base64(text: str, where: str, opening: Opening) -> Picture:
  """A picture from base64 or a data: URL; nothing else is opened.

  Args:
    text: what the client sent.
    where: its name in messages.
    opening: size and limits.

  Raises:
    Refused: it is neither, or no such picture.
  """
  if (start := _DATA_URL.match(text)) is None and (address := _ADDRESS.match(text)):
    raise Refused(422, 'no_addresses', f'{where} is an address ({address[0]}), and none is opened; '
                  'wanted the picture itself: data:image/png;base64,...')
  try:
    data = base64.b64decode(text[start.end() if start else 0:], validate=True)
  except (binascii.Error, ValueError):
    raise Refused(422, 'no_base64', f'{where} is no base64, and no file or address is opened; '
                  'wanted the bytes of a picture in base64') from None
  return decoded(data, where, opening)


def decoded(data: bytes, where: str, opening: Opening) -> Picture:
  """A picture from the bytes of its file; Refused as above."""
  limits = opening.limits
  if data.startswith(b'\xff\xd8') and _has_many_scans(data):
    raise Refused(422, 'too_many_scans', f'{where} is a JPEG of more than {_MOST_SCANS} scans, or '
                  f'{_MOST_SEGMENTS:,} segments; save it anew')
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
      width, height = picture.size
      each = _JPEG_BYTES if picture.format == 'JPEG' and picture.mode != 'CMYK' else _BYTES
  except Image.DecompressionBombError:
    raise _too_large(where, limits) from None
  except Exception:  # decoders raise exceptions of many types
    raise Refused(422, 'no_picture', f'{where} is no picture ({len(data):,} bytes); wanted one of '
                  f'{", ".join(FORMATS)}') from None
  if width * height > limits.pixels:
    raise _too_large(where, limits, f' has {width}x{height} pixels,')
  try:
    with opening.room.taken(width * height * each):
      picture = images.decode(data, (opening.size, opening.size))
  except UserError as error:
    raise Refused(422, 'no_picture', str(error).replace('image', where, 1)) from None
  opening.hold(picture.pixels.nbytes)
  return Picture(data, picture)


def _has_many_scans(data):
  """Whether the first picture of a JPEG has too many parts: each scan passes over all pixels."""
  segments, scans, at = 0, 0, 2
  while (marker := _MARKER.search(data, at)) and marker[1] != b'\xd9':  # the end of the picture
    segments, scans = segments + 1, scans + (marker[1] == b'\xda')
    if segments > _MOST_SEGMENTS or scans > _MOST_SCANS:
      return True
    at = marker.end() + int.from_bytes(data[marker.end():marker.end() + 2])
  return False


def _too_large(where, limits, found=' has'):
  return Refused(422, 'too_many_pixels', f'{where}{found} more than the {limits.pixels:,} pixels '
                 'that are accepted; make it smaller')
