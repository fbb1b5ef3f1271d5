"""DeiT checkpoints: a ViT with a distillation token."""

from collections.abc import Mapping

from xmodal.models.towers.vit import ViT
from xmodal.pretrained import vit
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xmodal.pretrained.tensors import Entry

PART = 'vision'
MODULE = ViT
PREFIXES = ('deit.',)
RENAMES = vit.RENAMES
NAMESPACE, IGNORE = vit.NAMESPACE, vit.IGNORE
PREPROCESSING = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD)

variable_shapes = vit.variable_shapes


def module_from_config(config: Mapping, tensors: Mapping) -> ViT:
  """The ViT that a checkpoint's config.json describes; UserError if it is not supported."""
  return vit.module_from_config(config, tensors).clone(use_distillation_token=True)


def entries(module: ViT, source: ViT):
  """The table of tensors."""
  return [Entry('params/distillation_token', 'embeddings.distillation_token'),
          *vit.entries(module, source)]


def writes(module: ViT) -> bool:
  """Whether a ViT is of this family."""
  return (module.use_cls_token and module.use_distillation_token
          and not vit.is_dinov2(module))


def config_from_module(module: ViT) -> dict:
  """config.json for this module; UserError if transformers has no such DeiT."""
  return {**vit.config_from_module(module), 'architectures': ['DeiTModel'], 'model_type': 'deit'}
