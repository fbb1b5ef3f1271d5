"""ResNet checkpoints: basic and bottleneck blocks, v1.5 and v1."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.towers.resnet import ResNet
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xmodal.pretrained.tensors import Entry, init_shapes, norm, require

MODULE = ResNet
PART = 'vision'
PREFIXES = ('resnet.',)
RENAMES = ()
NAMESPACE = ('embedder', 'encoder')
IGNORE = r'.*\.num_batches_tracked'  # unused with a fixed momentum
PREPROCESSING = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)


def module_from_config(config: Mapping, tensors: Mapping) -> ResNet:
  """The ResNet that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  require(config, 'hidden_act', ('relu',))
  require(config, 'num_channels', (3,))
  require(config, 'layer_type', ('basic', 'bottleneck'))
  return ResNet(
      block=config['layer_type'], stage_sizes=tuple(config['depths']),
      widths=tuple(config['hidden_sizes']), embedding_size=config['embedding_size'],
      downsample_in_first_stage=config['downsample_in_first_stage'],
      downsample_in_bottleneck=config.get('downsample_in_bottleneck', False))


def variable_shapes(module: ResNet):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 64, 64, 3)))


def entries(module: ResNet, source: ResNet):
  """The table of tensors."""
  del source
  yield from _conv((), 'stem', 'embedder.embedder')
  for block, parts in variable_shapes(module)['params'].items():
    if not block.startswith('stage'):
      continue
    stage, number = (int(n) - 1 for n in block.removeprefix('stage').split('_block'))
    name = f'encoder.stages.{stage}.layers.{number}.'
    for part in parts:
      if part == 'shortcut':
        yield from _conv((block,), part, name + 'shortcut')
      elif not part.endswith('_norm'):
        yield from _conv((block,), part, f'{name}layer.{int(part.removeprefix("conv")) - 1}')


def _conv(where, part, name):
  """The entries of a convolution and the batch norm after it."""
  path = '/'.join((*where, part))
  yield Entry(f'params/{path}/kernel', f'{name}.convolution.weight', 'conv')
  yield from norm(f'params/{path}_norm', f'{name}.normalization')
  yield Entry(f'batch_stats/{path}_norm/mean', f'{name}.normalization.running_mean')
  yield Entry(f'batch_stats/{path}_norm/var', f'{name}.normalization.running_var')


def extra_tensors(module: ResNet) -> dict[str, np.ndarray]:
  """The batch counters that PyTorch stores with the running statistics."""
  return batch_counters(entries(module, module))


def batch_counters(table) -> dict[str, np.ndarray]:
  """A batch counter of 0 for each running variance of a table."""
  ending = '.running_var'
  return {entry.name.removesuffix(ending) + '.num_batches_tracked': np.zeros((), np.int64)
          for entry in table if entry.name.endswith(ending)}


def config_from_module(module: ResNet) -> dict:
  """config.json for this module; UserError if transformers has no such ResNet."""
  if module.norm != 'batch' or module.stem != 'imagenet' or module.dilate_last_stage:
    raise UserError(f'ResNet: norm {module.norm!r}, stem {module.stem!r} and dilate_last_stage '
                    f'{module.dilate_last_stage} have no counterpart in transformers, which has '
                    "'batch', 'imagenet' and False; it cannot be exported")
  return {
      'architectures': ['ResNetModel'], 'model_type': 'resnet', 'layer_type': module.block,
      'depths': list(module.stage_sizes), 'hidden_sizes': list(module.widths),
      'embedding_size': module.embedding_size, 'hidden_act': 'relu', 'num_channels': 3,
      'downsample_in_first_stage': module.downsample_in_first_stage,
      'downsample_in_bottleneck': module.downsample_in_bottleneck}
