"""The towers of a model: pretrained, or new ones that the config names.

`shared` holds the fields common to all towers: dtype, remat, attention, dropout_rate (convolutional
towers have no attention). They override those of a pretrained tower, incl. its dropout rate.
"""

from collections.abc import Mapping

from flax import linen as nn

from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.models.towers.t5 import T5
from xmodal.train.start.pretrained import Tower


def vision_tower(config, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained vision tower, or a new one described by config.model.vision."""
  image_size = (config.data.image_size,) * 2
  if pretrained is not None:
    return pretrained.clone(image_size=image_size, **shared)
  name = parts.family(config.model, 'vision')
  return parts.build(name, parts.fields(config.model, 'vision'), image_size=image_size, **shared)


def text_tower(config, vocab_size: int, shared: dict, pretrained: Tower | None = None) -> nn.Module:
  """The pretrained text tower, or a new one described by config.model.text."""
  if pretrained is not None:
    if (bias := config.model.text.neighbor_bias) is not None:
      raise UserError(f'config.model.text.neighbor_bias={bias} means nothing to a pretrained text '
                      'tower, which has its own learned bias; leave it out')
    # A tokenizer may have one token more: a pad token that the checkpoint was trained without.
    return pretrained.clone(vocab_size=max(vocab_size, pretrained.module.vocab_size), **shared)
  name = parts.family(config.model, 'text')
  return parts.build(name, parts.fields(config.model, 'text'), vocab_size=vocab_size, **shared)


def decoder_tower(config, text: nn.Module, vocab_size: int, shared: dict) -> T5 | None:
  """A T5 decoder that generates text, of the size's preset and
  config.model.text.num_decoder_layers; None if the text tower has a decoder."""
  if isinstance(text, T5) and text.num_decoder_layers:
    return None
  layers = config.model.text.num_decoder_layers
  sizes = parts.preset('t5', config.model.size) | (
      {} if layers is None else {'num_decoder_layers': layers})
  return parts.build('t5', sizes, vocab_size=vocab_size, **shared)


def overridden(config, towers: Mapping[str, Tower]) -> list[str]:
  """Lines on settings of pretrained towers that the config or the checkpoint overrides."""
  lines = []
  for part, tower in towers.items():
    keys, where = set(parts.own_fields(config.model, part)), f'config.model.{part}'
    if not getattr(tower.module, 'num_decoder_layers', 0):
      keys.discard('num_decoder_layers')  # it sets the separate decoder
    if keys:
      lines.append(f'{where}: {", ".join(sorted(keys))} not used: the sizes are those of the '
                   f'pretrained {tower.family}')
    name = config.model[part].name
    if name != parts.DEFAULTS[part] and not isinstance(tower.module, parts.PARTS[name].make):
      lines.append(f'{where}.name={name} not used: the tower is the pretrained {tower.family}')
    rate = getattr(tower.module, 'dropout_rate', 0.0)
    if rate and rate != config.model.dropout_rate:
      lines.append(f'{part} tower: dropout_rate is the {config.model.dropout_rate} of '
                   f'config.model.dropout_rate, not the {rate} of its checkpoint')
  return lines
