"""Reads a vision tower's preprocessing: preprocessor_config.json, processor_config.json
(transformers 5), or timm's pretrained_cfg."""

import math
import os
from typing import NamedTuple

from xmodal.errors import UserError
from xmodal.pretrained.files import read_json

FILE, _PROCESSOR_FILE = 'preprocessor_config.json', 'processor_config.json'
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
  """Size and normalisation of the pictures that a tower was trained on.

  Attributes:
    image_size: (height, width), pixels.
    mean, std: of each colour channel, for pixels in 0..1.
  """

  image_size: tuple[int, int]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def to_config(self) -> dict:
    """preprocessor_config.json, as the image processors of transformers read it."""
    height, width = self.image_size
    return {'image_processor_type': 'ViTImageProcessor', 'do_resize': True, 'do_rescale': True,
            'do_normalize': True, 'rescale_factor': 1 / 255, 'resample': 2,
            'image_mean': list(self.mean), 'image_std': list(self.std),
            'size': {'height': height, 'width': width}}


def read_preprocessing(folder: str, config: dict, default: Preprocessing,
                       image_size: tuple[int, int] | None) -> Preprocessing:
  """Reads the preprocessing from the files of a checkpoint.

  Args:
    folder: folder of the checkpoint.
    config: its config.json.
    default: the family's defaults for values that the files do not state.
    image_size: (height, width) of the tower's position table, if it has one; takes precedence.

  Raises:
    UserError: a stated value is invalid or not supported.
  """
  path, stated = _read_settings(folder, config)
  for key in ('rescale_offset', 'do_flip_channel_order'):
    if stated.get(key):
      raise UserError(f'{path}: {key} is {stated[key]!r}, which is not supported; choose another '
                      'checkpoint, or delete the key if it was trained without')
  mean, std = (_channels(path, stated, key, preset) for key, preset in (
      ('image_mean', default.mean), ('image_std', default.std)))
  if not stated.get('do_normalize', True):
    mean, std = (0.0,) * 3, (1.0,) * 3
  if min(std) <= 0:
    raise UserError(f'{path}: image_std is {stated.get("image_std")!r}; wanted three numbers '
                    'above 0, for red, green, blue')
  # A pixel x of 0..255 becomes (x * factor - mean) / std; ours are divided by 255 before.
  factor = 1.0 if not stated.get('do_rescale', True) else _rescale_factor(path, stated)
  scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor
  cropped = stated.get('crop_size') if stated.get('do_center_crop', True) else None
  size = image_size or _size(path, cropped) or _size(path, stated.get('size')) or default.image_size
  return Preprocessing(size, tuple(m / scale for m in mean), tuple(s / scale for s in std))


def _read_settings(folder, config):
  """(file, its settings for pictures); as in transformers, processor_config.json comes first."""
  path = os.path.join(folder, _PROCESSOR_FILE)
  if os.path.exists(path) and 'image_processor' in (processor := read_json(path)):
    stated = processor['image_processor']
    if not isinstance(stated, dict):
      raise UserError(f'{path}: image_processor is {stated!r}, wanted an object; copy it again')
    return path, _with_defaults(stated)
  path = os.path.join(folder, FILE)
  if os.path.exists(path):
    return path, _with_defaults(read_json(path))
  path, timm = os.path.join(folder, 'config.json'), config.get('pretrained_cfg') or {}
  if not isinstance(timm, dict):
    raise UserError(f'{path}: pretrained_cfg is {timm!r}, wanted an object; copy it again')
  size = timm.get('input_size')
  return path, {'image_mean': timm.get('mean'), 'image_std': timm.get('std'),
                'size': size[-2:] if isinstance(size, list) else size}


def _with_defaults(stated):
  """The stated settings, with missing keys set to the defaults of the processor's class."""
  kind = stated.get('image_processor_type') or stated.get('feature_extractor_type')
  if not isinstance(kind, str):
    return stated
  import transformers  # seconds to import
  kind = kind.removesuffix('Fast').replace('FeatureExtractor', 'ImageProcessor')
  # The Pillow variant does not need torchvision; defaults are class attributes.
  known = getattr(transformers, f'{kind}Pil', None)
  return {key: value for key in ('image_mean', 'image_std', 'size', 'crop_size', 'do_center_crop',
                                 'do_normalize', 'do_rescale', 'rescale_factor', 'rescale_offset',
                                 'do_flip_channel_order')
          if (value := getattr(known, key, None)) is not None} | stated


def _channels(path, stated, key, preset):
  """Three finite numbers; a single number is used for all channels."""
  value = stated.get(key)
  if value is None:
    return preset
  values = [value] * 3 if isinstance(value, int | float) else value
  try:
    numbers = tuple(map(float, values))
  except (TypeError, ValueError):
    numbers = ()
  if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
    raise UserError(f'{path}: {key} is {value!r}; wanted three numbers, for red, green, blue')
  return numbers


def _rescale_factor(path, stated):
  value = stated.get('rescale_factor')
  if value is None:
    return 1 / 255
  try:
    factor = float(value)
  except (TypeError, ValueError):
    factor = math.nan
  if not 0 < factor < math.inf:
    raise UserError(f'{path}: rescale_factor is {value!r}; wanted a number above 0, such as 1/255')
  return factor


def _size(path, stated):
  """(height, width) from any of the formats in use; None if it is not stated."""
  size = stated
  if isinstance(size, dict):
    side = size.get('shortest_edge')
    size = [size.get('height', side), size.get('width', side)]
  if isinstance(size, int | float | str):
    size = [size, size]
  if not size or None in size:
    return None
  try:
    sides = tuple(int(side) for side in size)
  except (TypeError, ValueError, OverflowError):
    sides = ()
  if len(sides) != 2 or min(sides) < 1 or any(float(a) != b for a, b in zip(size, sides)):
    raise UserError(f'{path}: size is {stated!r}; wanted height and width, whole numbers from 1')
  return sides
