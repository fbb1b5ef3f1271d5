"""The towers of a model: pretrained ones, or those that the config names.

`shared` holds the fields that all towers have: dtype, remat, attention, dropout_rate.
"""

from flax import linen as nn

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.models.bert import Bert
from xmodal.models.gpt2 import Gpt2
from xmodal.models.resnet import ResNet
from xmodal.models.t5 import T5
from xmodal.models.vgg import VGG
from xmodal.models.vit import ViT
from xmodal.train.weights import Tower


def vision_tower(config, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained one, or a ViT, ResNet or VGG as config.model.vision says."""
  image_size = (config.data.image_size,) * 2
  if pretrained is not None:
    return pretrained.clone(image_size=image_size, **shared)
  sizes = configs.tower_sizes(config, 'vision')
  if config.model.vision.name in ('resnet', 'vgg'):
    kind = {'resnet': ResNet, 'vgg': VGG}[config.model.vision.name]
    return kind(**sizes, dtype=shared['dtype'])
  return ViT(image_size=image_size, use_cls_token=False, **stack(sizes, shared))


def text_tower(config, vocab_size: int, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained one, or a T5, BERT or GPT-2 as config.model.text says."""
  if pretrained is not None:
    # A tokenizer may know a token more: a pad token that the checkpoint was trained without.
    return pretrained.clone(vocab_size=max(vocab_size, pretrained.module.vocab_size), **shared)
  fields = stack(configs.tower_sizes(config, 'text'), shared)
  neighbor_bias = config.model.text.neighbor_bias
  if config.model.text.name == 't5':
    return _t5(vocab_size, {**fields, 'neighbor_bias': neighbor_bias})
  if neighbor_bias is not None:
    raise UserError(f'config.model.text.neighbor_bias={neighbor_bias} means nothing to '
                    f'{config.model.text.name}; leave it out')
  return {'bert': Bert, 'gpt2': Gpt2}[config.model.text.name](vocab_size=vocab_size, **fields)


def decoder_tower(config, text: nn.Module, vocab_size: int, shared: dict) -> T5 | None:
  """A T5 of the size's preset to write answers, or None if the text tower can."""
  if isinstance(text, T5) and text.num_decoder_layers:
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
