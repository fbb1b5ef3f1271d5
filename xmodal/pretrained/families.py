"""The supported families of checkpoints, and the family of a config or a module."""

import importlib
import os
import re

from flax import linen as nn

from xmodal.errors import UserError
from xmodal.pretrained.files import read_json

# model_type in config.json -> the file for the family. Each such file has
#   PART      'vision', 'text', or 'detector' for a whole model
#   NAMESPACE first parts of the tower's own tensor names; all others are heads of other tasks
#   PREFIXES  usual prefixes of all tensor names (others are found, too)
#   RENAMES   (regex, replacement) for the names in files of other versions
#   IGNORE    regex of tensors in its modules that it does not use
#   tied(config) -> {own name: other names that the same tensor may be saved under}, optional
#   module_from_config(config, tensors) -> the Flax module
#   variable_shapes(module) -> pytree of shapes of all variables that it may have
#   entries(module, source) -> the table for tensors.read_variables and write_tensors;
#             source is the module of the files, whose sizes may differ
#   PREPROCESSING  default preprocessing of a vision tower's pictures
#   AS_PART   {'vision': family}, optional: the family that reads that part of its checkpoints
#   MODULE    the class of its modules; if families share one, writes(module) tells
#             whether a module is of this family
#   trimmed(module, variables) -> the module for a subset of the variables, optional
#   extra_tensors(module) -> {name: array}, optional: tensors that other readers expect and
#             that are not variables of ours
#   config_from_module(module) -> config.json, so that transformers loads what we save
FAMILIES = {
    't5': 't5', 'mt5': 't5', 'bert': 'bert', 'gpt2': 'gpt2', 'vit': 'vit', 'deit': 'deit',
    'siglip': 'siglip', 'siglip_vision_model': 'siglip', 'dinov2': 'dinov2',
    'dinov2_with_registers': 'dinov2', 'resnet': 'resnet', 'vgg': 'vgg', 'detr': 'detr'}


_MODULES: dict[str, str] = {}  # of families that plugins add


def add_family(name: str, model_types: tuple[str, ...], module: str) -> None:
  """Registers a family of checkpoints from a plugin's module (pass `__name__`).

  Args:
    name: name of the family, saved in runs that start from it.
    model_types: its values of model_type in config.json.
    module: full name of the module, which defines what the comment on FAMILIES lists.

  Raises:
    UserError: another module has taken the name or one of the types.
  """
  if _MODULES.get(name, module) != module or name in FAMILIES.values() and name not in _MODULES or (
      any(FAMILIES.get(kind, name) != name for kind in model_types)):
    raise UserError(f'{module}: the family {name!r} of checkpoints, or one of its model types '
                    f'{", ".join(model_types)}, is taken; give it another name')
  _MODULES[name] = module
  FAMILIES.update(dict.fromkeys(model_types, name))


def read_config(folder: str, tensors) -> dict:
  """config.json, completed with the family's defaults.

  Without a config.json, a VGG recognised by its tensors gives {'model_type': 'vgg'}.
  """
  path = os.path.join(folder, 'config.json')
  # torchvision's networks have no config: their tensors are sufficient.
  if not os.path.exists(path) and any(
      f'.{name}'.endswith('.features.0.weight') for name in tensors):
    return {'model_type': 'vgg'}
  config = read_json(path)
  model_type = config.get('model_type')
  if model_type is None and str(config.get('architecture', '')).startswith('vgg'):
    return {**config, 'model_type': 'vgg'}
  if not isinstance(model_type, str) or model_type not in FAMILIES or model_type == 'vgg':
    return config
  from transformers import CONFIG_MAPPING  # seconds to import
  if model_type not in CONFIG_MAPPING:  # a plugin's
    return config
  # transformers 4 writes backbone_kwargs for timm backbones; for them, 5 would query the hub.
  known = {key: value for key, value in config.items() if key != 'backbone_kwargs'}
  kind = CONFIG_MAPPING[model_type]
  known = _convert_numbers(known, kind().to_dict(), kind.attribute_map)
  try:
    filled = kind.from_dict(known).to_dict()
  except Exception as error:  # the library checks types and raises errors of any kind
    raise UserError(f'{path}: {" ".join(str(error).split())}; correct it, or copy it '
                    'again') from error
  # transformers always sets T5's tie_word_embeddings to True, so the file's flags win.
  return {**filled, **{key: value for key, value in config.items() if isinstance(value, bool)}}


def _convert_numbers(config, defaults, other_names):
  """Converts numbers written as text ("1e-12" in YAML) or as 64.0 to the type of the default."""
  return {key: _convert(value, defaults.get(other_names.get(key, key), ''))
          for key, value in config.items()}


def _convert(value, default):
  if isinstance(value, dict) and isinstance(default, dict):
    return _convert_numbers(value, default, {})
  if isinstance(value, list):
    number = default[0] if isinstance(default, list | tuple) and default else default
    return [_convert(item, number) for item in value]
  if isinstance(default, bool) or not isinstance(default, int | float | None):
    return value
  if isinstance(value, str):
    try:
      value = float(value) if re.search(r'[.eE]', value) else int(value)
    except ValueError:  # not a number: the library reports the expected type
      return value
  if isinstance(default, float):
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
  return int(value) if isinstance(value, float) and value.is_integer() else value


def family_of(config: dict, where: str, part: str | None = None) -> str:
  """The family of a config, or that of one of its parts; UserError if there is none."""
  model_type = config.get('model_type')
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise UserError(f'{where}/config.json: model_type is {model_type!r}, wanted one of '
                    f'{", ".join(FAMILIES)}')
  name = FAMILIES[model_type]
  return getattr(family_module(name), 'AS_PART', {}).get(part, name)


def family_module(name: str):
  """The module of a family, for a value of FAMILIES."""
  return importlib.import_module(_MODULES.get(name, f'xmodal.pretrained.{name}'))


def family_of_module(module: nn.Module):
  """The family file that can write a tower; UserError if there is none."""
  return family_module(family_name(module))


def family_name(module: nn.Module) -> str:
  """The family that can write a tower; UserError if there is none."""
  for name in dict.fromkeys(FAMILIES.values()):
    family = family_module(name)
    if type(module) is family.MODULE and getattr(family, 'writes', lambda _: True)(module):
      return name
  raise UserError(f'{type(module).__name__}: no family of checkpoints has such a tower, wanted '
                  f'one of {", ".join(FAMILIES)}')
