"""VGG checkpoints of torchvision and timm, which use the same tensor names."""

from collections.abc import Mapping
import re

import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.towers.vgg import VGG
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xmodal.pretrained.resnet import batch_counters
from xmodal.pretrained.tensors import Entry, init_shapes, norm

PART = 'vision'
MODULE = VGG
PREFIXES = ()
RENAMES = ()
NAMESPACE = ('features',)
IGNORE = r'.*\.num_batches_tracked'  # unused with a fixed momentum
PREPROCESSING = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)

STAGE_SIZES = {'vgg11': (1, 1, 2, 2, 2), 'vgg13': (2, 2, 2, 2, 2), 'vgg16': (2, 2, 3, 3, 3),
               'vgg19': (2, 2, 4, 4, 4)}
MODULES = {name + suffix: VGG(sizes, batch_norm=bool(suffix))
           for name, sizes in STAGE_SIZES.items() for suffix in ('', '_bn')}


def module_from_config(config: Mapping, tensors: Mapping) -> VGG:
  """The VGG that these tensors belong to; UserError if the config states another.

  It is the known VGG with the most similar tensor names; missing or surplus tensors
  are then reported by name.
  """
  found = {int(match[1]) for name in tensors.keys()
           if (match := re.fullmatch(r'features\.(\d+)\.weight', name))}
  name = min(MODULES, key=lambda name: len(found ^ _weights(MODULES[name])))
  stated = config.get('architecture', name)
  if stated != name:
    raise UserError(f'checkpoint config.json: architecture is {stated!r}, but the tensors are '
                    f'those of {name}; copy both of the same checkpoint')
  return MODULES[name]


def _weights(module):
  """Indices of the layers that have weights."""
  step = 1 if module.batch_norm else 0
  return {n + i for _, n in _convolutions(module) for i in range(step + 1)}


def _convolutions(module):
  """(our name, index in torch's Sequential) of each convolution."""
  number = 0
  for i, num_convs in enumerate(module.stage_sizes):
    for j in range(num_convs):
      yield f'stage{i + 1}_conv{j + 1}', number
      number += 3 if module.batch_norm else 2  # itself, the norm, ReLU
    number += 1  # pooling


def variable_shapes(module: VGG):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 32, 32, 3)))


def entries(module: VGG, source: VGG):
  """The table of tensors."""
  del source
  for name, number in _convolutions(module):
    yield Entry(f'params/{name}/kernel', f'features.{number}.weight', 'conv')
    yield Entry(f'params/{name}/bias', f'features.{number}.bias')
    if module.batch_norm:
      yield from norm(f'params/{name}_norm', f'features.{number + 1}')
      yield Entry(f'batch_stats/{name}_norm/mean', f'features.{number + 1}.running_mean')
      yield Entry(f'batch_stats/{name}_norm/var', f'features.{number + 1}.running_var')


def extra_tensors(module: VGG) -> dict[str, np.ndarray]:
  """The batch counters that PyTorch stores with the running statistics."""
  return batch_counters(entries(module, module))


def config_from_module(module: VGG) -> dict:
  """config.json as timm writes it; UserError if timm has no such VGG."""
  name = next((name for name, known in MODULES.items()
               if (known.stage_sizes, known.widths, known.batch_norm)
               == (tuple(module.stage_sizes), tuple(module.widths), module.batch_norm)), None)
  if name is None:
    raise UserError(f'VGG: stage_sizes {module.stage_sizes} and widths {module.widths} are none of '
                    f'those of {", ".join(STAGE_SIZES)}; it cannot be exported')
  size, mean, std = PREPROCESSING
  return {'architecture': name, 'num_features': 4096,
          'pretrained_cfg': {'architecture': name, 'input_size': [3, *size], 'mean': list(mean),
                             'std': list(std)}}
