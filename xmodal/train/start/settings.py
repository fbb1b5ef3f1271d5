"""Settings for starting from an earlier run: which parameters to take, and their sizes.

    xmodal train --config detection --config.train.start_from=runs/vqa

A parameter of the same path and shape is copied. One with an axis of tokens, answers, positions or
layers is fitted (see train.start.fits). All others keep their usual initial values.
"""

from collections.abc import Collection
import re

from xmodal.errors import UserError
from xmodal.models import joint, parts
from xmodal.options import Option

OPTIONS = {
    'start_from': Option(
        '', "Run to initialise parameters from: its workdir, WORKDIR/best or "
        "WORKDIR/checkpoints/STEP; '': none. Values that the config leaves at their defaults come "
        'from that run: sizes, pretrained towers, config.data.image_size, and the tokenizer, which '
        'is extended with words of the new data up to config.model.text.vocab_size.'),
    'start_parts': Option(
        '', "Regular expression searched in paths; matching parameters are taken, such as "
        "'vision_tower|cross_modal'; '': all that fit.", is_pattern=True)}

# Parameter path of the part of each slot that every model may have.
MODULES = {'vision': 'backbone/vision_tower/', 'text': 'backbone/text_tower/',
            'cross': 'backbone/cross_modal/', 'denoiser': 'heads_generation/denoiser/'}


def select(names: Collection[str], pattern: str, where: str) -> frozenset[str]:
  """Selects paths of an earlier run's parameters by config.train.start_parts.

  Args:
    names: all paths.
    pattern: regular expression searched in paths; '': all.
    where: the run, for messages.

  Raises:
    UserError: the pattern, or one of its alternatives, matches no path.
  """
  for part in _alternatives(pattern):
    if not any(re.search(part, name) for name in names):
      begin = sorted({'/'.join(name.split('/')[:2 if name.startswith('backbone/') else 1])
                      for name in names})
      what = repr(pattern) if part == pattern else f'{part!r} of {pattern!r}'
      raise UserError(f'config.train.start_parts: {what} matches no parameter of {where}; wanted a '
                      f'regular expression that matches paths, which begin with {", ".join(begin)}')
  return frozenset(name for name in names if re.search(pattern, name))


def _alternatives(pattern):
  """The top-level alternatives of a regular expression, split at each '|' outside brackets."""
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
  """Raises UserError if a tower would come from both a pretrained checkpoint and the earlier run.

  Args:
    config: config of the new run.
    then: config of the earlier run.
    names: paths of the parameters to take from it.
    towers: its pretrained towers.
  """
  for part in parts.DEFAULTS:
    name = config.model[part].pretrained
    if not name or not any(path.startswith(MODULES[part]) for path in names):
      continue
    if part not in towers or name != then.model[part].pretrained:
      rest = f'^(?!{MODULES[part]})'
      raise UserError(
          f'config.model.{part}.pretrained={name!r} and config.train.start_from='
          f'{config.train.start_from!r} both have a {part} tower: remove the first, or exclude '
          f'this tower from the second with config.train.start_parts={rest!r}')


def resolve(config, then, names: Collection[str], towers: Collection[str]):
  """Fills in the config's default values from the earlier run.

  Sizes are filled in only for parts with parameters to take, and only if config.model.size is not
  set to another size than there. See `check_towers` for the arguments.

  Raises:
    UserError: the sizes are incompatible.
  """
  config = config.copy_and_resolve_references()
  # Towers of other senses than pictures and text are in `more_towers`.
  is_taken = {slot: any(path.startswith(MODULES.get(slot, f'backbone/more_towers_{slot}/'))
                        for path in names) for slot in parts.slots()}
  _fill(config.model, then.model, {'size': joint.OPTIONS['size']})
  if is_taken['vision'] and config.data.image_size is None:
    config.data.image_size = then.data.image_size
  for slot in filter(is_taken.get, parts.slots()):
    own, old = config.model[slot], then.model[slot]
    if slot in towers:
      own.pretrained = old.pretrained  # so that a third run can set the same value
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
  """Fills in the config of a resumed run that started from an earlier run, as its first start did.

  Args:
    config: the config given now.
    then: the config saved in the run's folder.
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
  """Overwrites keys that are at their defaults."""
  for key, option in options.items():
    if key in values and section[key] == option.default:
      section[key] = values[key]
