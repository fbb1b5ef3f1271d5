"""The families of checkpoints that are known, and which of them a config or a module is of."""

import importlib
import os
import re

from flax import linen as nn

from xmodal.errors import UserError
from xmodal.pretrained.files import read_json

# What config.json calls a family, and the file that knows it. Each such file has
#   PART      'vision', 'text' or, for what is no tower but a whole model, 'detector'
#   NAMESPACE first parts of the tower's own names of tensors: all else is other tasks' heads
#   PREFIXES  what files usually put before every tensor's name (any other is found, too)
#   RENAMES   (regex, replacement) for the names that files of other years use
#   IGNORE    regex of the tensors in its modules that it does not need
#   tied(config) -> {own name: other names that the same tensor may be saved under}, if any
#   module_from_config(config, tensors) -> the Flax module
#   variable_shapes(module) -> pytree of all variables that it may have
#   entries(module, source) -> the table for tensors.read_variables and write_tensors;
#             source is the module that the files are of, where sizes may differ
#   PREPROCESSING  of a vision tower's pictures, where no file states it
#   MODULE    the class of its modules; where families share one, writes(module) says
#             whether a module is of this family
#   trimmed(module, variables), where variables may be of a part: the module of that part
#   extra_tensors(module) -> {name: array}, if it has one: what others look for in a file, and
#             no variable of ours is
#   config_from_module(module) -> config.json, so that transformers loads what we save
FAMILIES = {
    't5': 't5', 'mt5': 't5', 'bert': 'bert', 'gpt2': 'gpt2', 'vit': 'vit', 'deit': 'deit',
    'siglip': 'siglip', 'siglip_vision_model': 'siglip', 'dinov2': 'dinov2',
    'dinov2_with_registers': 'dinov2', 'resnet': 'resnet', 'vgg': 'vgg', 'detr': 'detr'}


_MODULES: dict[str, str] = {}  # of families that plugins add


def add_family(name: str, model_types: tuple[str, ...], module: str) -> None:
  """Makes a family of checkpoints known, from a plugin's module (pass `__name__`).

  Args:
    name: of the family, written into the runs that start from it.
    model_types: what config.json calls it.
    module: full name of the module, which has what the comment on FAMILIES lists.

  Raises:
    UserError: another module has that name or one of those types.
  """
  if _MODULES.get(name, module) != module or name in FAMILIES.values() and name not in _MODULES or (
      any(FAMILIES.get(kind, name) != name for kind in model_types)):
    raise UserError(f'{module}: the family {name!r} of checkpoints, or one of its model types '
                    f'{", ".join(model_types)}, is taken; give it another name')
  _MODULES[name] = module
  FAMILIES.update(dict.fromkeys(model_types, name))


def read_config(folder: str, tensors) -> dict:
  """config.json with the family's defaults filled in; {'model_type': 'vgg'} where timm has none."""
  path = os.path.join(folder, 'config.json')
  # torchvision's networks come without a config: their tensors say all.
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
  # What transformers 4 said of a timm backbone with these, 5 asks the hub about.
  known = {key: value for key, value in config.items() if key != 'backbone_kwargs'}
  kind = CONFIG_MAPPING[model_type]
  known = _of_near_types(known, kind().to_dict(), kind.attribute_map)
  try:
    filled = kind.from_dict(known).to_dict()
  except Exception as error:  # the library checks types, and raises whatever it meets
    raise UserError(f'{path}: {" ".join(str(error).split())}; correct it, or copy it '
                    'again') from error
  # transformers sets T5's tie_word_embeddings to True whatever the file says.
  return {**filled, **{key: value for key, value in config.items() if isinstance(value, bool)}}


def _of_near_types(config, defaults, other_names):
  """Numbers that other tools wrote as text ("1e-12" of YAML) or as 64.0, as what they mean."""
  return {key: _near(value, defaults.get(other_names.get(key, key), ''))
          for key, value in config.items()}


def _near(value, default):
  if isinstance(value, dict) and isinstance(default, dict):
    return _of_near_types(value, default, {})
  if isinstance(value, list):
    number = default[0] if isinstance(default, list | tuple) and default else default
    return [_near(item, number) for item in value]
  if isinstance(default, bool) or not isinstance(default, int | float | None):
    return value
  if isinstance(value, str):
    try:
      value = float(value) if re.search(r'[.eE]', value) else int(value)
    except ValueError:  # no number: the library says what it wants instead
      return value
  if isinstance(default, float):
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
  return int(value) if isinstance(value, float) and value.is_integer() else value


def family_of(config: dict, where: str):
  """The file of FAMILIES that knows a config; UserError if none does."""
  model_type = config.get('model_type')
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise UserError(f'{where}/config.json: model_type is {model_type!r}; known are '
                    f'{", ".join(FAMILIES)}')
  return family_module(FAMILIES[model_type])


def family_module(name: str):
  """The file of a family, by a value of FAMILIES."""
  return importlib.import_module(_MODULES.get(name, f'xmodal.pretrained.{name}'))


def family_of_module(module: nn.Module):
  """The file of FAMILIES that writes a tower; UserError if none does."""
  for name in dict.fromkeys(FAMILIES.values()):
    family = family_module(name)
    if type(module) is family.MODULE and getattr(family, 'writes', lambda _: True)(module):
      return family
  raise UserError(f'{type(module).__name__}: no family of checkpoints has such a tower; known are '
                  f'{", ".join(FAMILIES)}')
