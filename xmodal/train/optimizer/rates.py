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

_FIRST = r'embedding|stem'
# Towers of pictures and text have rates of their own; those of other senses have 1.
_TOWER = re.compile(r'backbone/(?:(vision|text)_tower|more_towers_\w+)/')


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
  towers: dict[str, dict] = {}
  for name, x in flat.items():
    if found := _TOWER.match(name):
      towers.setdefault(found[0], {})[name.removeprefix(found[0])] = x
  for inside, own in towers.items():
    rate = {'vision': config.vision_rate, 'text': config.text_rate}.get(_TOWER.match(inside)[1], 1)
    for name, distance in _distances(own).items():
      factors[inside + name] = np.float32(rate * config.layer_decay ** distance)
  return factors


def _distances(tower):
  """Distance of each parameter of one tower {path: array} from the top, in layers."""
  first = re.compile('|'.join([_FIRST, *declared('first_parameters')]))
  layers = re.compile('|'.join(declared('numbered_layers')))
  numbers = {name: _number(layers, name) for name in tower}
  numbered = sorted(set(numbers.values()) - {None})
  stacked = max([0, *(x.shape[0] for name, x in tower.items() if _is_stacked(name))])
  distances = {}
  for name, x in tower.items():
    if _is_stacked(name):
      depth = x.shape[0]
      distances[name] = np.arange(depth, 0, -1).reshape(depth, *(1,) * (x.ndim - 1))
    elif (number := numbers[name]) is not None:
      distances[name] = np.array(stacked + len(numbered) - numbered.index(number))
    else:
      is_first = first.search(name.removeprefix('resnet/').split('/')[0])
      distances[name] = np.array(stacked + len(numbered) + 1 if is_first else 0)
  return distances


def _is_stacked(name):
  return name.split('/')[0].endswith('layers')


def _number(layers, name):
  """The numbers by which a layer of its own is ordered, such as (stage, block); None for others."""
  found = layers.match(name)
  return found and tuple(int(number) for number in found.groups() if number)
