"""DINOv2 checkpoints, with registers and without."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from xmodal.errors import UserError
from xmodal.models.towers.vit import ViT
from xmodal.pretrained import vit
from xmodal.pretrained.positions import resize_positions
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xmodal.pretrained.tensors import Entry, linear, norm

PART = 'vision'
MODULE = ViT
PREFIXES = ('dinov2.', 'dinov2_with_registers.')
# transformers 5: names in memory -> names in files.
RENAMES = ((r'\.q_proj\.', '.attention.query.'), (r'\.k_proj\.', '.attention.key.'),
           (r'\.v_proj\.', '.attention.value.'), (r'\.o_proj\.', '.output.dense.'))
NAMESPACE = ('embeddings', 'encoder', 'layernorm')
IGNORE = r'embeddings\.mask_token'  # used in pretraining only
PREPROCESSING = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)

variable_shapes = vit.variable_shapes


def module_from_config(config: Mapping, tensors: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  num_registers = config.get('num_register_tokens', 0)
  if config['model_type'] == 'dinov2_with_registers' and num_registers < 1:
    raise UserError(f'checkpoint config.json: num_register_tokens is {num_registers}, wanted 1 or '
                    'more; choose a dinov2 checkpoint without registers')
  swiglu = config['use_swiglu_ffn']
  return ViT(
      mlp_dim=_mlp_dim(config['hidden_size'], config['mlp_ratio'], swiglu), swiglu=swiglu,
      num_registers=num_registers, layer_scale=config['layerscale_value'],
      dropout_rate=config['hidden_dropout_prob'], qkv_bias=config['qkv_bias'],
      **vit.shared_fields(config))


def _mlp_dim(hidden_dim, ratio, swiglu):
  mlp_dim = int(hidden_dim * ratio)
  # SwiGLU has a third matrix: two thirds of the width, rounded up to a multiple of 8, keeps the
  # number of parameters.
  return (int(mlp_dim * 2 / 3) + 7) // 8 * 8 if swiglu else mlp_dim


def entries(module: ViT, source: ViT):
  """The table of tensors."""
  layer = 'encoder.layer.{}.'
  registers = ([Entry('params/registers', 'embeddings.register_tokens')]
               if module.num_registers else [])
  return [
      Entry('params/cls_token', 'embeddings.cls_token'),
      *registers,
      Entry('params/position_embedding', 'embeddings.position_embeddings', 'batched',
            # Models with registers interpolate their positions with antialiasing.
            fit=resize_positions(source, module, antialias=source.num_registers > 0)),
      *vit.patches('embeddings.patch_embeddings.projection'),
      *norm('params/layers/attention_norm', layer + 'norm1'),
      *vit.attention(module, layer + 'attention.', 'attention.query', 'attention.key',
                     'attention.value', 'output.dense'),
      Entry('params/layers/attention_scale', layer + 'layer_scale1.lambda1'),
      *norm('params/layers/mlp_norm', layer + 'norm2'),
      *(_swiglu if module.swiglu else _mlp)(layer + 'mlp.'),
      Entry('params/layers/mlp_scale', layer + 'layer_scale2.lambda1'),
      *norm('params/final_norm', 'layernorm'),
  ]


def _mlp(name):
  return [*linear('params/layers/mlp/up', name + 'fc1'),
          *linear('params/layers/mlp/down', name + 'fc2')]


def _swiglu(name):
  both = [dataclasses.replace(entry, part=(number, 2))
          for number, part in enumerate(('gate', 'up'))
          for entry in linear(f'params/layers/mlp/{part}', name + 'weights_in')]
  return both + linear('params/layers/mlp/down', name + 'weights_out')


def writes(module: ViT) -> bool:
  """Whether a ViT is of this family."""
  return module.use_cls_token and not module.use_distillation_token and vit.is_dinov2(module)


def extra_tensors(module: ViT) -> dict[str, np.ndarray]:
  """The token that replaces masked patches in pretraining, at its initial value 0."""
  return {'embeddings.mask_token': np.zeros((1, module.hidden_dim), np.float32)}


def config_from_module(module: ViT) -> dict:
  """config.json for this module; UserError if transformers has no such DINOv2."""
  vit.check_square(module, 'DINOv2')
  if module.layer_scale is None:
    raise UserError('ViT: layer_scale is None, but the DINOv2 of transformers has one; swiglu or '
                    'registers without it cannot be exported')
  ratio = next((r for r in range(1, 65)
                if _mlp_dim(module.hidden_dim, r, module.swiglu) == module.mlp_dim), None)
  if ratio is None:
    raise UserError(f'ViT: mlp_dim {module.mlp_dim} results from no integer mlp_ratio of '
                    f'hidden_dim {module.hidden_dim}, which the DINOv2 of transformers requires; '
                    'it cannot be exported')
  config = {
      'architectures': ['Dinov2Model'], 'model_type': 'dinov2', 'mlp_ratio': ratio,
      'use_swiglu_ffn': module.swiglu, 'layerscale_value': module.layer_scale,
      'hidden_dropout_prob': module.dropout_rate, 'qkv_bias': module.qkv_bias,
      **vit.shared_config(module)}
  if module.num_registers:
    config |= {'architectures': ['Dinov2WithRegistersModel'],
               'model_type': 'dinov2_with_registers', 'num_register_tokens': module.num_registers}
  return config
