"""ViT checkpoints, and the code that the other families of ViTs share with them."""

from collections.abc import Mapping

import jax.numpy as jnp

from xmodal.errors import UserError
from xmodal.models.towers.vit import ViT
from xmodal.pretrained.positions import resize_positions
from xmodal.pretrained.preprocessing import Preprocessing
from xmodal.pretrained.tensors import Entry, init_shapes, linear, norm, require

MODULE = ViT
PART = 'vision'
PREFIXES = ('vit.',)
# transformers 5: names in memory -> names in files.
RENAMES = ((r'^layers\.', 'encoder.layer.'),
           (r'\.attention\.([qkv])_proj\.', r'.attention.attention.\1_proj.'),
           (r'\.q_proj\.', '.query.'), (r'\.k_proj\.', '.key.'), (r'\.v_proj\.', '.value.'),
           (r'\.o_proj\.', '.output.dense.'),
           (r'\.mlp\.fc1\.', '.intermediate.dense.'), (r'\.mlp\.fc2\.', '.output.dense.'))
NAMESPACE = ('embeddings', 'encoder', 'layernorm', 'layers')
IGNORE = r'embeddings\.mask_token'  # used in pretraining only
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)

GELU = {'gelu': 'exact', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}


def module_from_config(config: Mapping, tensors: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  return ViT(mlp_dim=config['intermediate_size'], dropout_rate=config['hidden_dropout_prob'],
             qkv_bias=config['qkv_bias'], **shared_fields(config))


def shared_fields(config: Mapping) -> dict:
  """The fields with the same config keys in all ViT families; UserError if not supported."""
  require(config, 'hidden_act', GELU)
  require(config, 'num_channels', (3,))
  patch_size = pair(config['patch_size'])
  if patch_size[0] != patch_size[1]:
    raise UserError(f'checkpoint config.json: patch_size is {patch_size}, only square patches can '
                    'be read; choose another checkpoint')
  return dict(
      patch_size=patch_size[0], hidden_dim=config['hidden_size'],
      num_heads=config['num_attention_heads'], num_layers=config['num_hidden_layers'],
      image_size=pair(config['image_size']), layer_norm_eps=config['layer_norm_eps'],
      gelu=GELU[config['hidden_act']])


def pair(size) -> tuple[int, int]:
  """(height, width) from a number or a pair."""
  if isinstance(size, int):
    return size, size
  if len(size) != 2:
    raise UserError(f'checkpoint config.json: {size} is not (height, width); copy it again')
  return tuple(size)


def variable_shapes(module: ViT):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, *module.image_size, 3)))


def entries(module: ViT, source: ViT):
  """The table of tensors."""
  layer = 'encoder.layer.{}.'
  return [
      Entry('params/cls_token', 'embeddings.cls_token'),
      Entry('params/position_embedding', 'embeddings.position_embeddings', 'batched',
            fit=resize_positions(source, module)),
      *patches('embeddings.patch_embeddings.projection'),
      *norm('params/layers/attention_norm', layer + 'layernorm_before'),
      *attention(module, layer + 'attention.', 'attention.query', 'attention.key',
                 'attention.value', 'output.dense'),
      *norm('params/layers/mlp_norm', layer + 'layernorm_after'),
      *linear('params/layers/mlp/up', layer + 'intermediate.dense'),
      *linear('params/layers/mlp/down', layer + 'output.dense'),
      *norm('params/final_norm', 'layernorm'),
  ]


def patches(name):
  """The entries of the patch embedding, a convolution."""
  return [Entry('params/stem/projection/kernel', f'{name}.weight', 'patch'),
          Entry('params/stem/projection/bias', f'{name}.bias')]


def attention(module, prefix, query, key, value, out):
  """The entries of attention, for the names of its four linear layers."""
  names = dict(query=query, key=key, value=value, out=out)
  return [entry for part, name in names.items()
          for entry in linear(f'params/layers/attention/{part}', prefix + name)
          if module.qkv_bias or part == 'out' or not entry.path.endswith('bias')]


def writes(module: ViT) -> bool:
  """Whether a ViT is of this family."""
  return (module.use_cls_token and not module.use_distillation_token
          and not is_dinov2(module))


def is_dinov2(module: ViT) -> bool:
  """Whether a ViT has features that only DINOv2 has."""
  return bool(module.swiglu or module.num_registers or module.layer_scale is not None)


def config_from_module(module: ViT) -> dict:
  """config.json for this module; UserError if transformers has no such ViT."""
  return {'architectures': ['ViTModel'], 'model_type': 'vit', 'intermediate_size': module.mlp_dim,
          'hidden_dropout_prob': module.dropout_rate, 'qkv_bias': module.qkv_bias,
          **shared_config(module)}


def shared_config(module: ViT) -> dict:
  """The config keys that `shared_fields` reads; UserError if the stem has no counterpart."""
  if module.stem != 'patch':
    raise UserError(f"ViT: stem {module.stem!r} has no counterpart in transformers, which has "
                    "'patch'; it cannot be exported")
  height, width = module.image_size
  return {
      'hidden_size': module.hidden_dim, 'num_hidden_layers': module.num_layers,
      'num_attention_heads': module.num_heads, 'patch_size': module.patch_size,
      'image_size': height if height == width else [height, width], 'num_channels': 3,
      'layer_norm_eps': module.layer_norm_eps,
      'hidden_act': {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh'}[module.gelu]}


def check_square(module: ViT, family: str) -> None:
  """Raises UserError if image_size is not square, which the family requires."""
  if module.image_size[0] != module.image_size[1]:
    raise UserError(f'ViT: image_size is {module.image_size}, but the {family} of transformers '
                    'supports only square pictures; it cannot be exported')
