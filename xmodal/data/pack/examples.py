"""Examples and their pictures as records of a pack.

A picture's record is the picture file. An example's record is a msgpack map of its fields that are
set; `picture` is the number of the picture's record, and `name` that of its file.
"""

from collections.abc import Callable
import dataclasses
import functools
import io
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from xmodal.data.example import DEFAULTS, Example, Object, Packed
from xmodal.data.pictures import images
from xmodal.errors import UserError

_DEFAULTS = {name: value for name, value in DEFAULTS.items()
             if name not in ('objects', 'expression', 'recorded_size')}
_OBJECT = tuple(field.name for field in dataclasses.fields(Object))


def to_record(example: Example, picture: int, scale: float = 1.0) -> bytes:
  """The record of an example.

  Args:
    example: the example.
    picture: number of its picture's record.
    scale: of the picture's sides where it was made smaller: boxes are in its pixels.

  Raises:
    UserError: an input of another sense has a type that no record can hold.
  """
  record: dict[str, Any] = {'picture': picture}
  if isinstance(example.image, (bytes, np.ndarray)):
    record['kind'] = 'bytes' if isinstance(example.image, bytes) else 'pixels'
  else:
    record['name'] = str(example.image)
  record |= {key: value for key, default in _DEFAULTS.items()
             if (value := getattr(example, key)) is not default and value != default}
  if example.objects is not None:
    record['objects'] = [_thing(thing, scale) for thing in example.objects]
  if example.expression is not None:
    record['expression'] = _thing(example.expression, scale)
  if example.recorded_size is not None:
    record['recorded_size'] = [side * scale for side in example.recorded_size]
  return msgpack.packb(record, default=_plain)


def _thing(thing, scale):
  area = None if thing.area is None else thing.area * scale**2
  fields = {name: getattr(thing, name) for name in _OBJECT} | {
      'box': [side * scale for side in thing.box], 'area': area}
  return {key: value for key, value in fields.items() if value is not None}


def _plain(value):
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray):
    return {'array': value.tobytes(), 'dtype': value.dtype.str, 'shape': value.shape}
  raise UserError(f'a value of type {type(value).__name__} cannot be packed')


def _array(value):
  if value.keys() != {'array', 'dtype', 'shape'}:
    return value
  return np.frombuffer(value['array'], value['dtype']).reshape(value['shape'])


def from_record(data: bytes, read_picture: Callable[[int], bytes]) -> Example:
  """The example of a record.

  Args:
    data: the record.
    read_picture: number of a picture's record -> its data; called when the picture is decoded.
  """
  # The hook is called for each map of a record: a pass over millions takes half as long without.
  record = msgpack.unpackb(data, use_list=False, object_hook=_array if b'array' in data else None)
  number, kind = record.pop('picture'), record.pop('kind', '')
  for key in ('objects', 'expression'):
    if key in record:
      things = record[key]
      record[key] = (tuple(Object(**thing) for thing in things) if key == 'objects'
                     else Object(**things))
  if kind:
    picture = read_picture(number)
    image = picture if kind == 'bytes' else np.asarray(Image.open(io.BytesIO(picture)))
  else:
    image = Packed(record.pop('name'), functools.partial(read_picture, number))
  return Example(image, **record)


def picture_file(image: Any, longest: int | None, quality: int) -> tuple[bytes, float]:
  """A picture as a file's bytes, and the factor by which its sides were made smaller.

  Args:
    image: see Example.image. Pixels become PNG, and so do two pictures side by side.
    longest: most pixels of a side; None: files stay as they are.
    quality: of JPEG, for pictures that are made smaller.

  Raises:
    UserError: the picture cannot be read.
  """
  if isinstance(image, images.SideBySide):
    image = images.decode(image, (images.MAX_PIXELS,) * 2).pixels
  if isinstance(image, np.ndarray):
    return _encoded(image, 'PNG', compress_level=1), 1.0
  data, _ = images.read_bytes(image)
  if longest is None:
    return data, 1.0
  size = images.decode(data, (8, 8)).size
  if max(size) <= longest:
    return data, 1.0
  pixels, _ = images.load_within(data, longest)
  return _encoded(pixels, 'JPEG', quality=quality), max(pixels.shape[:2]) / max(size)


def _encoded(pixels, kind, **options):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()
