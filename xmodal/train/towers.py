"""The towers that a config names, to be trained from nothing.

`shared` holds the fields that all towers have: dtype, remat, attention, dropout_rate.
"""

from flax import linen as nn

from xmodal import config as configs
from xmodal.models.bert import Bert
from xmodal.models.gpt2 import Gpt2
from xmodal.models.resnet import ResNet
from xmodal.models.t5 import T5
from xmodal.models.vit import ViT


def vision_tower(config, shared: dict) -> nn.Module:
  """A ViT or a ResNet, as config.model.vision says."""
  sizes = configs.tower_sizes(config, 'vision')
  if config.model.vision.name == 'resnet':
    return ResNet(**sizes, dtype=shared['dtype'])
  size = config.data.image_size
  return ViT(image_size=(size, size), use_cls_token=False, **stack(sizes, shared))


def text_tower(config, vocab_size: int, shared: dict) -> nn.Module:
  """A T5, BERT or GPT-2, as config.model.text says."""
  fields = stack(configs.tower_sizes(config, 'text'), shared)
  if config.model.text.name == 't5':
    return _t5(vocab_size, fields)
  return {'bert': Bert, 'gpt2': Gpt2}[config.model.text.name](vocab_size=vocab_size, **fields)


def decoder_tower(config, vocab_size: int, shared: dict) -> T5 | None:
  """A T5 of the size's preset to write answers, or None if the text tower can."""
  if config.model.text.name == 't5':
    return None
  return _t5(vocab_size, stack(configs.SIZES[config.model.size]['t5'], shared))


def stack(sizes: dict, shared: dict) -> dict:
  """The fields of a stack of layers of these sizes."""
  # A few layers run faster as straight code; many compile faster as a loop.
  unroll = sizes['num_layers'] if sizes['num_layers'] <= 4 else 1
  return {**sizes, **shared, 'scan_unroll': unroll}


def _t5(vocab_size, fields):
  return T5(vocab_size=vocab_size, gated=True, tie_word_embeddings=False,
            scale_decoder_outputs=False, **fields)
