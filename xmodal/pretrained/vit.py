"""ViT and DeiT checkpoints."""

from collections.abc import Mapping

import jax.numpy as jnp

from xmodal.errors import UserError
from xmodal.models.vit import ViT
from xmodal.pretrained.positions import resize_positions
from xmodal.pretrained.preprocessing import Preprocessing
from xmodal.pretrained.tensors import Entry, init_shapes, linear, norm, require

MODULE = ViT
PART = 'vision'
PREFIXES = ('vit.', 'deit.')
RENAMES = ()
# The pooler and the classifiers belong to other tasks' heads.
IGNORE = r'pooler\..*|classifier\..*|cls_classifier\..*|distillation_classifier\..*|embeddings\.mask_token'
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)


def module_from_config(config: Mapping, tensors: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; raises UserError if none does."""
  del tensors
  require(config, 'hidden_act', ('gelu', 'gelu_new', 'gelu_pytorch_tanh'))
  require(config, 'qkv_bias', (True,))
  require(config, 'num_channels', (3,))
  return ViT(
      patch_size=square_patch(config), hidden_dim=config['hidden_size'],
      mlp_dim=config['intermediate_size'], num_heads=config['num_attention_heads'],
      num_layers=config['num_hidden_layers'], image_size=pair(config['image_size']),
      layer_norm_eps=config['layer_norm_eps'], dropout_rate=config['hidden_dropout_prob'],
      gelu='exact' if config['hidden_act'] == 'gelu' else 'tanh')


def variable_shapes(module: ViT):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, *module.image_size, 3)))


def square_patch(config) -> int:
  """The side of a patch, pixels; UserError if patches are not square."""
  patch_size = pair(config['patch_size'])
  if patch_size[0] != patch_size[1]:
    raise UserError(f'checkpoint config.json: patch_size is {patch_size}, only square patches can '
                    'be read; choose another checkpoint')
  return patch_size[0]


def pair(size) -> tuple[int, int]:
  """(height, width) of a number or a pair."""
  return (size, size) if isinstance(size, int) else tuple(size)


def entries(module: ViT, source: ViT):
  """The table of tensors."""
  layer = 'encoder.layer.{}.'
  return [
      Entry('params/cls_token', 'embeddings.cls_token'),
      Entry('params/position_embedding', 'embeddings.position_embeddings', 'batched',
            fit=resize_positions(source, module)),
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


def config_from_module(module: ViT) -> dict:
  """config.json of a checkpoint of this module."""
  return {
      'architectures': ['ViTModel'], 'model_type': 'vit', 'hidden_size': module.hidden_dim,
      'num_hidden_layers': module.num_layers, 'num_attention_heads': module.num_heads,
      'intermediate_size': module.mlp_dim, 'patch_size': module.patch_size,
      'image_size': list(module.image_size), 'layer_norm_eps': module.layer_norm_eps,
      'hidden_act': {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh'}[module.gelu], 'qkv_bias': True,
      'num_channels': 3, 'hidden_dropout_prob': module.dropout_rate}
