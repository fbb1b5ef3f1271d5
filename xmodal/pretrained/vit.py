"""ViT checkpoints: config.json and safetensors to the Flax module and its parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.vit import ViT
from xmodal.pretrained.tensors import (
    Entry, init_shapes, linear, norm, require, variables_from_tensors)

# The pooler and the classifier belong to other tasks' heads.
IGNORE = r'pooler\..*|classifier\..*'


def module_from_config(config: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; raises UserError if none does."""
  require(config, 'model_type', ('vit',))
  require(config, 'hidden_act', ('gelu', 'gelu_new', 'gelu_pytorch_tanh'))
  require(config, 'qkv_bias', (True,))
  require(config, 'num_channels', (3,))
  patch_size = _pair(config['patch_size'])
  if patch_size[0] != patch_size[1]:
    raise UserError(f'checkpoint config.json: patch_size is {patch_size}, only square patches can '
                    'be read; choose another checkpoint')
  return ViT(
      patch_size=patch_size[0], hidden_dim=config['hidden_size'],
      mlp_dim=config['intermediate_size'], num_heads=config['num_attention_heads'],
      num_layers=config['num_hidden_layers'], image_size=_pair(config['image_size']),
      layer_norm_eps=config['layer_norm_eps'], dropout_rate=config['hidden_dropout_prob'],
      gelu='exact' if config['hidden_act'] == 'gelu' else 'tanh')


def to_flax(tensors: Mapping[str, np.ndarray], module: ViT) -> dict:
  """Parameters of module ({'params': ...}) from the tensors of a safetensors file.

  Raises:
    UserError: a tensor is missing, has the wrong shape, or is not of a ViT.
  """
  images = jnp.zeros((1, *module.image_size, 3))
  return variables_from_tensors(tensors, _entries(), init_shapes(module, images),
                                prefix='vit.', ignore=IGNORE)


def _pair(size):
  return (size, size) if isinstance(size, int) else tuple(size)


def _entries():
  layer = 'encoder.layer.{}.'
  return [
      Entry('params/cls_token', 'embeddings.cls_token'),
      Entry('params/position_embedding', 'embeddings.position_embeddings', 'batched'),
      Entry('params/stem/projection/kernel', 'embeddings.patch_embeddings.projection.weight',
            'patch'),
      Entry('params/stem/projection/bias', 'embeddings.patch_embeddings.projection.bias'),
      *norm('params/layers/attention_norm', layer + 'layernorm_before'),
      *linear('params/layers/attention/query', layer + 'attention.attention.query'),
      *linear('params/layers/attention/key', layer + 'attention.attention.key'),
      *linear('params/layers/attention/value', layer + 'attention.attention.value'),
      *linear('params/layers/attention/out', layer + 'attention.output.dense'),
      *norm('params/layers/mlp_norm', layer + 'layernorm_after'),
      *linear('params/layers/mlp/up', layer + 'intermediate.dense'),
      *linear('params/layers/mlp/down', layer + 'output.dense'),
      *norm('params/final_norm', 'layernorm'),
  ]
