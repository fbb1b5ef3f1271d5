"""What a new run takes over from an earlier one: which parameters, and the sizes they come with.

    xmodal train --config detection --config.train.start_from=runs/vqa

A parameter of the same path and shape is copied, one that counts tokens, answers, places or layers
is made to fit (see train.start.fits), every other one begins as it would without the earlier run.
"""

from collections.abc import Collection
import re

from xmodal.errors import UserError
from xmodal.models import joint, parts
from xmodal.options import Option

OPTIONS = {
    'start_from': Option(
        '', "An earlier run whose parameters a new one begins with: its workdir, WORKDIR/best or "
        "WORKDIR/checkpoints/STEP; '': none. What the config leaves open is as in that run: sizes, "
        'pretrained towers, config.data.image_size, and the tokenizer, to which the words of the '
        'new data are added up to config.model.text.vocab_size.'),
    'start_parts': Option(
        '', "Regular expression found in the paths of the parameters that are taken, such as "
        "'vision_tower|cross_modal'; '': all that fit.", is_pattern=True)}

# Where in the model the part of each slot is.
_MODULES = {'vision': 'backbone/vision_tower/', 'text': 'backbone/text_tower/',
            'cross': 'backbone/cross_modal/', 'denoiser': 'heads_generation/denoiser/'}


def select(names: Collection[str], pattern: str, where: str) -> frozenset[str]:
  """Of the paths of an earlier run's parameters, those that config.train.start_parts selects.

  Args:
    names: all paths.
    pattern: regular expression found in paths; '': all.
    where: the run, for messages.

  Raises:
    UserError: the pattern, or one of those between its '|', is found in no path.
  """
  for part in _alternatives(pattern):
    if not any(re.search(part, name) for name in names):
      begin = sorted({'/'.join(name.split('/')[:2 if name.startswith('backbone/') else 1])
                      for name in names})
      what = repr(pattern) if part == pattern else f'{part!r} of {pattern!r}'
      raise UserError(f'config.train.start_parts: {what} matches no parameter of {where}; wanted a '
                      f'regular expression found in paths, which begin with {", ".join(begin)}')
  return frozenset(name for name in names if re.search(pattern, name))


def _alternatives(pattern):
  """The expressions between those '|' of a regular expression that stand in no bracket."""
  flags = re.match(r'(\(\?[aimsx]+\))?', pattern)[0]
  found, depth = [''], 0
  for piece in re.findall(r'\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.', pattern, re.DOTALL):
    depth += (piece == '(') - (piece == ')')
    if piece == '|' and not depth:
      found.append(flags)
    else:
      found[-1] += piece
  return found


def check_towers(config, then, names: Collection[str], towers: Collection[str]) -> None:
  """Raises UserError where a pretrained tower is to be another than that of the earlier run.

  Args:
    config: of the new run.
    then: config of the earlier run.
    names: paths of the parameters that are taken from it.
    towers: its pretrained towers.
  """
  for part in parts.DEFAULTS:
    name = config.model[part].pretrained
    if not name or not any(path.startswith(_MODULES[part]) for path in names):
      continue
    if part not in towers or name != then.model[part].pretrained:
      rest = f'^(?!{_MODULES[part]})'
      raise UserError(
          f'config.model.{part}.pretrained={name!r} and config.train.start_from='
          f'{config.train.start_from!r} both have a {part} tower: leave out the first, or take the '
          f'rest of the second with config.train.start_parts={rest!r}')


def settle(config, then, names: Collection[str], towers: Collection[str]):
  """The config with what it leaves at its defaults filled in as in the earlier run.

  Sizes of parts of which nothing is taken stay open, and all do where config.model.size is given
  and another than there. Arguments as of `check_towers`.

  Raises:
    UserError: the sizes do not go together.
  """
  config = config.copy_and_resolve_references()
  is_taken = {slot: any(path.startswith(module) for path in names)
              for slot, module in _MODULES.items()}
  _fill(config.model, then.model, {'size': joint.OPTIONS['size']})
  if is_taken['vision'] and config.data.image_size is None:
    config.data.image_size = then.data.image_size
  for slot in filter(is_taken.get, parts.slots()):
    own, old = config.model[slot], then.model[slot]
    if slot in towers:
      own.pretrained = old.pretrained  # so that a third run may name the same
      continue
    given = {key for key, option in parts.slot_options(slot).items() if own[key] != option.default}
    if slot in parts.DEFAULTS and own.name == parts.DEFAULTS[slot] and (
        given <= set(parts.PARTS[old.name].options)):
      own.name = old.name
    if parts.family(config.model, slot) == parts.family(then.model, slot) and (
        config.model.size == then.model.size):
      _fill(own, parts.fields(then.model, slot), parts.slot_options(slot))
    parts.fields(config.model, slot)
  return config


def resume(config, then):
  """The config of a run that began with an earlier one, filled in as its first start filled it.

  Args:
    config: as it is given now.
    then: as the run's own folder has it.
  """
  if not then.train.start_from:
    return config
  config = config.copy_and_resolve_references()
  _fill(config.model, then.model, {'size': joint.OPTIONS['size']})
  if config.data.image_size is None:
    config.data.image_size = then.data.image_size
  for slot in parts.slots():
    _fill(config.model[slot], then.model[slot],
          {**parts.sense_options(slot), **parts.slot_options(slot)})
  return config


def _fill(section, values, options):
  """Gives keys that are at their defaults other values."""
  for key, option in options.items():
    if key in values and section[key] == option.default:
      section[key] = values[key]
