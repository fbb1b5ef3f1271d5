"""How a vision tower's pictures were made ready: preprocessor_config.json, or timm's
pretrained_cfg."""

import os
from typing import NamedTuple

from xmodal.errors import UserError
from xmodal.pretrained.files import read_json

FILE = 'preprocessor_config.json'
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preprocessing(NamedTuple):
  """What pictures a tower was trained on.

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
  """The preprocessing that the files of a checkpoint state.

  Args:
    folder: of the checkpoint.
    config: its config.json.
    default: the family's, for what the files leave open.
    image_size: (height, width) of the tower's position table, if it has one; it has the last word.

  Raises:
    UserError: the file states what cannot be followed.
  """
  path = os.path.join(folder, FILE)
  if os.path.exists(path):
    stated = read_json(path)
  else:
    timm = config.get('pretrained_cfg') or {}
    stated = {'image_mean': timm.get('mean'), 'image_std': timm.get('std'),
              'size': (timm.get('input_size') or [None, None])[-2:]}
  mean, std = stated.get('image_mean') or default.mean, stated.get('image_std') or default.std
  if stated.get('do_normalize') is False:
    mean, std = (0.0,) * 3, (1.0,) * 3
  cropped = stated.get('crop_size') if stated.get('do_center_crop', True) else None
  size = image_size or _size(cropped)
  size = size or _size(stated.get('size')) or default.image_size
  try:
    made = Preprocessing(size, tuple(map(float, mean)), tuple(map(float, std)))
  except (TypeError, ValueError):
    made = None
  if made is None or len(made.mean) != 3 or len(made.std) != 3 or min(made.std) <= 0:
    raise UserError(f'{path}: image_mean is {mean!r} and image_std {std!r}; wanted three numbers '
                    'each, of red, green, blue')
  return made


def _size(size):
  """(height, width) of the ways in which files of several years state it; None if they do not."""
  if isinstance(size, dict):
    side = size.get('shortest_edge')
    size = [size.get('height', side), size.get('width', side)]
  if isinstance(size, int):
    size = [size, size]
  return tuple(size) if size and all(size) else None
