"""Parts of a model that have size presets: towers, cross-modal layers, denoiser.

A part registers with its options, its presets, and fixed fields:

    @PARTS.register('vit', options=WIDTHS | {'patch_size': size('Side of a patch in pixels.')},
                    slot='vision', presets=PRESETS, fixed={'use_cls_token': False})
    class ViT(nn.Module): ...

Facts:
  slot: its role in the model and its section of the config, config.model.SLOT. For towers 'vision'
    or 'text', where config.model.SLOT.name selects one; 'cross' and 'denoiser' have one part each.
  presets: {name of a size: fields}, one for each of SIZES.
  fixed: fields that no option changes.
  sharding: rules for parameters that the common rules do not cover (see sharding.rules).
  first_parameters: regular expressions of the parameters before its first layer, beside stems and
    embeddings (see train.optimizer.rates).
  numbered_layers: regular expressions of its layers that are not stacked, whose groups are numbers
    in the order of the layers.
"""

import dataclasses

from flax import linen as nn

from xmodal.errors import UserError
from xmodal.options import Option, Options
from xmodal.registry import Registry

PARTS = Registry('part', 'config.model', 'xmodal.models.towers', 'xmodal.models.cross_modal',
                 'xmodal.models.denoiser.denoiser')
# small to xl: ViT (arXiv:2010.11929, 2106.04560), T5 v1.1, BERT (small: arXiv:1908.08962, xl:
# Megatron's of 1.3B) and GPT-2 (small: DistilGPT2; large and xl as published) sizes; denoiser:
# base, large and xl as JiT's B, L and H (arXiv:2511.13720).
SIZES = ('tiny', 'small', 'base', 'large', 'xl')


def size(what: str) -> Option:
  """An option for a size that the presets set."""
  return Option(None, f'{what} None: from config.model.size.', kind=int, low=1)


WIDTHS = {'hidden_dim': size('Width of the tokens.'), 'mlp_dim': size('Width inside the MLPs.'),
          'num_heads': size('Attention heads.'), 'num_layers': size('Layers.'),
          'head_dim': Option(None, 'Width of a head. None: from config.model.size, else hidden_dim '
                             '/ num_heads.', kind=int, low=1)}

# For a text tower without a decoder, which gets a T5 decoder of the same size.
WRITER = {'num_decoder_layers': size('Layers of the T5 decoder that writes answers.')}


# Default towers of the two senses that every model has.
DEFAULTS = {'vision': 'vit', 'text': 't5'}


def families(slot: str) -> tuple[str, ...]:
  """Names of the parts that fit a slot."""
  return tuple(name for name, part in PARTS.items() if part.facts['slot'] == slot)


def slots() -> tuple[str, ...]:
  """All slots."""
  return tuple(sorted({part.facts['slot'] for part in PARTS.values()}))


def sense_options(slot: str) -> Options:
  """The options that select the tower of a sense; {} for other slots."""
  if slot in families(slot):  # the slot's only part has its name, so it is no sense
    return {}
  name = {'name': Option(DEFAULTS.get(slot, families(slot)[0]), 'Family of the tower.',
                         choices=families(slot))}
  if slot not in DEFAULTS:
    return name
  return {**name, 'pretrained': Option(
      '', "A checkpoint in HuggingFace's layout, its folder or its name on the hub; '': train from "
      'scratch.')}


def slot_options(slot: str) -> Options:
  """The options of all parts for a slot.

  Raises:
    UserError: two parts declare the same key differently.
  """
  found: dict = {}
  for name in families(slot):
    for key, option in PARTS[name].options.items():
      if found.setdefault(key, option) != option:
        raise UserError(f'{name!r} declares config.model.{slot}.{key}, which another of '
                        f'{", ".join(families(slot))} declares differently; give it another name')
  return found


def family(model, slot: str) -> str:
  """Name of the part that a config selects for a slot; model: config.model."""
  name = model[slot].get('name', slot)
  if name not in families(slot):
    raise UserError(f'config.model.{slot}.name={name!r}: wanted one of {", ".join(families(slot))}')
  return name


def own_fields(model, slot: str) -> dict:
  """The fields of a slot that the config sets itself, to other values than the defaults."""
  return {key: model[slot][key] for key, option in slot_options(slot).items()
          if model[slot][key] != option.default}


def fields(model, slot: str) -> dict:
  """The fields of a slot's part: its preset, overridden by the config.

  Raises:
    UserError: the size or part is unknown, the part lacks an option, or num_heads does not divide
      hidden_dim.
  """
  name, own = family(model, slot), own_fields(model, slot)
  if unknown := set(own) - set(PARTS[name].options):
    key = min(unknown)
    raise UserError(f'config.model.{slot}.{key}={own[key]!r} means nothing to {name}; leave it out')
  defaults = {key: option.default for key, option in PARTS[name].options.items()
              if option.default is not None}
  found = {**preset(name, model.size), **defaults, **own}
  heads = found.get('num_heads', 1)
  if 'head_dim' not in found and found.get('hidden_dim', heads) % heads:
    raise UserError(f'config.model.{slot}: hidden_dim={found["hidden_dim"]} does not divide into '
                    f'num_heads={heads} heads; change one of them')
  return found


def preset(name: str, size_name: str) -> dict:
  """The fields of a part in one of SIZES."""
  presets = PARTS[name].facts['presets']
  if size_name not in presets:
    raise UserError(f'config.model.size={size_name!r}: wanted one of {", ".join(presets)}')
  return presets[size_name]


def build(name: str, given: dict, **shared) -> nn.Module:
  """Creates a part from its fixed fields, `given`, and those of `shared` that it has."""
  part = PARTS[name]
  known = {field.name for field in dataclasses.fields(part.make)}
  # A few layers run faster unrolled; many compile faster as a loop.
  layers = given.get('num_layers', 0)
  shared = {'scan_unroll': layers if layers <= 4 else 1, **shared}
  return part.make(**{**{key: value for key, value in {**shared, **given}.items() if key in known},
                      **part.facts.get('fixed', {})})
