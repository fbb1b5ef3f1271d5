"""The towers of a model: pretrained ones, or those that the config names.

`shared` holds the fields that all towers have: dtype, remat, attention, dropout_rate. Convolutional
ones have no attention. A pretrained tower gets them too: its checkpoint's dropout rate is not used.
"""

from collections.abc import Mapping

from flax import linen as nn

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.models.towers.bert import Bert
from xmodal.models.towers.gpt2 import Gpt2
from xmodal.models.towers.resnet import ResNet
from xmodal.models.towers.t5 import T5
from xmodal.models.towers.vgg import VGG
from xmodal.models.towers.vit import ViT
from xmodal.train.weights import Tower

KINDS = {'vit': ViT, 'resnet': ResNet, 'vgg': VGG, 't5': T5, 'bert': Bert, 'gpt2': Gpt2}


def vision_tower(config, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained one, or a ViT, ResNet or VGG as config.model.vision says."""
  image_size = (config.data.image_size,) * 2
  if pretrained is not None:
    return pretrained.clone(image_size=image_size, **shared)
  sizes = configs.tower_sizes(config, 'vision')
  if config.model.vision.name in ('resnet', 'vgg'):
    options = {key: shared[key] for key in ('dtype', 'remat', 'dropout_rate')}
    return KINDS[config.model.vision.name](**sizes, **options)
  return ViT(image_size=image_size, use_cls_token=False, **stack(sizes, shared))


def text_tower(config, vocab_size: int, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained one, or a T5, BERT or GPT-2 as config.model.text says."""
  neighbor_bias = config.model.text.neighbor_bias
  if pretrained is not None:
    if neighbor_bias is not None:
      raise UserError(f'config.model.text.neighbor_bias={neighbor_bias} means nothing to a '
                      'pretrained text tower, which has learned its own; leave it out')
    # A tokenizer may know a token more: a pad token that the checkpoint was trained without.
    return pretrained.clone(vocab_size=max(vocab_size, pretrained.module.vocab_size), **shared)
  fields = stack(configs.tower_sizes(config, 'text'), shared)
  if config.model.text.name == 't5':
    return _t5(vocab_size, {**fields, 'neighbor_bias': neighbor_bias})
  if neighbor_bias is not None:
    raise UserError(f'config.model.text.neighbor_bias={neighbor_bias} means nothing to '
                    f'{config.model.text.name}; leave it out')
  return KINDS[config.model.text.name](vocab_size=vocab_size, **fields)


def decoder_tower(config, text: nn.Module, vocab_size: int, shared: dict) -> T5 | None:
  """A T5 of the size's preset, with config.model.text.num_decoder_layers, to write answers; None if
  the text tower can."""
  if isinstance(text, T5) and text.num_decoder_layers:
    return None
  return _t5(vocab_size, stack(configs.decoder_sizes(config), shared))


def overruled(config, towers: Mapping[str, Tower]) -> list[str]:
  """Lines on what the config or a checkpoint says of pretrained towers and the other overrules."""
  lines = []
  for part, tower in towers.items():
    keys, where = set(configs.own_sizes(config, part)), f'config.model.{part}'
    if not getattr(tower.module, 'num_decoder_layers', 0):
      keys.discard('num_decoder_layers')  # of the decoder beside it
    if keys:
      lines.append(f'{where}: {", ".join(sorted(keys))} not used: the sizes are those of the '
                   f'pretrained {tower.family}')
    name = config.model[part].name
    if name != configs.base().model[part].name and not isinstance(tower.module, KINDS[name]):
      lines.append(f'{where}.name={name} not used: the tower is the pretrained {tower.family}')
    rate = getattr(tower.module, 'dropout_rate', 0.0)
    if rate and rate != config.model.dropout_rate:
      lines.append(f'{part} tower: dropout_rate is the {config.model.dropout_rate} of '
                   f'config.model.dropout_rate, not the {rate} of its checkpoint')
  return lines


def stack(sizes: dict, shared: dict) -> dict:
  """The fields of a stack of layers of these sizes."""
  # A few layers run faster as straight code; many compile faster as a loop.
  unroll = sizes['num_layers'] if sizes['num_layers'] <= 4 else 1
  return {**sizes, **shared, 'scan_unroll': unroll}


def _t5(vocab_size, fields):
  return T5(vocab_size=vocab_size, gated=True, tie_word_embeddings=False,
            scale_decoder_outputs=False, **fields)
