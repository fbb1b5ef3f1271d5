"""Learning rate factor of each parameter, by tower and by depth.

Layer-wise decay follows BEiT (arXiv:2106.08254, `get_num_layer_for_vit` of its code). In a tower of
L layers, embeddings, absolute positions, extra tokens and the stem learn at decay^(L + 1), layer i
of 0..L-1 at decay^(L - i), and parameters after the layers (final norm, lm_head) and relative
position tables shared by all layers at 1. Everything outside the towers learns at 1.

- T5: encoder and decoder are separate stacks, each with its own depth; the token embedding uses the
  L of the deeper one.
- ResNet and VGG: each residual block or convolution of the stages is a layer. Those of a DETR lie
  below its encoder's.
"""

import re

from flax import traverse_util
import numpy as np

from xmodal.registry import declared

_FIRST = r'embedding|stem|cls_token|distillation_token|registers'
_NUMBERED = re.compile(r'(?:resnet/)?stage(\d+)_[a-z]+(\d+)')  # stage1_block2, stage1_conv2_norm


def rates(config, params) -> dict[str, np.ndarray]:
  """Learning rate factor of each parameter, by path.

  Args:
    config: config.optimizer.
    params: all parameters, or their shapes.

  Returns:
    float32 scalars; [L, 1, ...] for parameters [L, ...] of a scan over layers.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  factors = {name: np.float32(1) for name in flat}
  for tower, rate in (('vision', config.vision_rate), ('text', config.text_rate)):
    inside = f'backbone/{tower}_tower/'
    own = {name.removeprefix(inside): x for name, x in flat.items() if name.startswith(inside)}
    for name, distance in _distances(own).items():
      factors[inside + name] = np.float32(rate * config.layer_decay ** distance)
  return factors


def _distances(tower):
  """Distance of each parameter of one tower {path: array} from the top, in layers."""
  first = re.compile('|'.join([_FIRST, *declared('first_parameters')]))
  numbered = sorted({_number(name) for name in tower} - {None})
  stacked = max([0, *(x.shape[0] for name, x in tower.items() if _is_stacked(name))])
  distances = {}
  for name, x in tower.items():
    if _is_stacked(name):
      layers = x.shape[0]
      distances[name] = np.arange(layers, 0, -1).reshape(layers, *(1,) * (x.ndim - 1))
    elif (number := _number(name)) is not None:
      distances[name] = np.array(stacked + len(numbered) - numbered.index(number))
    else:
      is_first = first.search(name.removeprefix('resnet/').split('/')[0])
      distances[name] = np.array(stacked + len(numbered) + 1 if is_first else 0)
  return distances


def _is_stacked(name):
  return name.split('/')[0].endswith('layers')


def _number(name):
  """(stage, index in it) of a numbered layer; None for others."""
  found = _NUMBERED.match(name)
  return found and tuple(map(int, found.groups()))
