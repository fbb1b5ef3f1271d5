"""The backbone and encoder of DETR checkpoints, as a vision tower."""

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp

from xmodal.models.towers.detr_encoder import DetrEncoder
from xmodal.pretrained import detr
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from xmodal.pretrained.tensors import init_shapes

MODULE = DetrEncoder
PART = 'vision'
PREFIXES, RENAMES, NAMESPACE = detr.PREFIXES, detr.RENAMES, detr.NAMESPACE
# The decoder and its queries have no place in a tower.
IGNORE = rf'{detr.IGNORE}|model\.(decoder|query_position_embeddings)\..*'
PREPROCESSING = Preprocessing((800, 800), IMAGENET_MEAN, IMAGENET_STD)
entries = detr.encoder_entries


def module_from_config(config: Mapping, tensors: Mapping) -> DetrEncoder:
  """The DetrEncoder that a DETR's config.json describes; UserError if it is not supported."""
  whole = detr.module_from_config(config, tensors)
  return DetrEncoder(**{field.name: getattr(whole, field.name)
                        for field in dataclasses.fields(DetrEncoder)
                        if field.name not in ('parent', 'name')})


def variable_shapes(module: DetrEncoder):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 64, 64, 3)))
