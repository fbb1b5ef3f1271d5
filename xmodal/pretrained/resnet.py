"""ResNet checkpoints: config.json and safetensors to the Flax module and its variables."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from xmodal.models.resnet import ResNet
from xmodal.pretrained.tensors import (
    Entry, init_shapes, norm, require, variables_from_tensors)

# The classifier belongs to another task; the counters have no use with a fixed momentum.
IGNORE = r'classifier\..*|.*\.num_batches_tracked'


def module_from_config(config: Mapping) -> ResNet:
  """The ResNet that a checkpoint's config.json describes; raises UserError if none does."""
  require(config, 'model_type', ('resnet',))
  require(config, 'hidden_act', ('relu',))
  require(config, 'num_channels', (3,))
  require(config, 'layer_type', ('basic', 'bottleneck'))
  return ResNet(
      block=config['layer_type'], stage_sizes=tuple(config['depths']),
      widths=tuple(config['hidden_sizes']), embedding_size=config['embedding_size'],
      downsample_in_first_stage=config['downsample_in_first_stage'],
      downsample_in_bottleneck=config.get('downsample_in_bottleneck', False))


def to_flax(tensors: Mapping[str, np.ndarray], module: ResNet) -> dict:
  """Variables {'params': ..., 'batch_stats': ...} from the tensors of a safetensors file.

  Raises:
    UserError: a tensor is missing, has the wrong shape, or is not of a ResNet.
  """
  shapes = init_shapes(module, jnp.zeros((1, 64, 64, 3)))
  return variables_from_tensors(tensors, list(_entries(shapes)), shapes, prefix='resnet.',
                                ignore=IGNORE)


def _entries(shapes):
  yield from _conv((), 'stem', 'embedder.embedder')
  for block, parts in shapes['params'].items():
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
