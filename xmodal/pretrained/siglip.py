"""SigLIP's vision tower, alone or from a checkpoint of both towers."""

from collections.abc import Mapping

from xmodal.errors import UserError
from xmodal.models.towers.vit import ViT
from xmodal.pretrained import vit
from xmodal.pretrained.positions import resize_positions
from xmodal.pretrained.preprocessing import Preprocessing
from xmodal.pretrained.tensors import Entry, linear, norm

PART = 'vision'
MODULE = ViT
PREFIXES = ('vision_model.',)
RENAMES = ()
NAMESPACE = ('embeddings', 'encoder', 'post_layernorm')
IGNORE = r'embeddings\.position_ids'  # a constant index buffer
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)

variable_shapes = vit.variable_shapes


def module_from_config(config: Mapping, tensors: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  config = config.get('vision_config', config)
  return ViT(mlp_dim=config['intermediate_size'], use_cls_token=False, **vit.shared_fields(config))


def entries(module: ViT, source: ViT):
  """The table of tensors."""
  layer = 'encoder.layers.{}.'
  return [
      Entry('params/position_embedding', 'embeddings.position_embedding.weight',
            fit=resize_positions(source, module)),
      *vit.patches('embeddings.patch_embedding'),
      *norm('params/layers/attention_norm', layer + 'layer_norm1'),
      *vit.attention(module, layer + 'self_attn.', 'q_proj', 'k_proj', 'v_proj', 'out_proj'),
      *norm('params/layers/mlp_norm', layer + 'layer_norm2'),
      *linear('params/layers/mlp/up', layer + 'mlp.fc1'),
      *linear('params/layers/mlp/down', layer + 'mlp.fc2'),
      *norm('params/final_norm', 'post_layernorm'),
  ]


def writes(module: ViT) -> bool:
  """Whether a ViT is of this family."""
  return not (module.use_cls_token or module.use_distillation_token or vit.is_dinov2(module))


def config_from_module(module: ViT) -> dict:
  """config.json for this module; UserError if transformers has no such SigLIP."""
  vit.check_square(module, 'SigLIP')
  if not module.qkv_bias:
    raise UserError('ViT: qkv_bias is False, but the SigLIP of transformers has these biases; it '
                    'cannot be exported')
  return {'architectures': ['SiglipVisionModel'], 'model_type': 'siglip_vision_model',
          'intermediate_size': module.mlp_dim, 'vision_use_head': False,
          **vit.shared_config(module)}
