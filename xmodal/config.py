"""The config: every key that a part declares, with its default, checks and help.

See xmodal.options for how parts declare keys. A file in configs/ changes what differs, no more.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import os

from ml_collections import ConfigDict

from xmodal import atomic
from xmodal.data import open as data_open
from xmodal.data import tokenizer
from xmodal.data.pictures import augmentation
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.mixer import feed
from xmodal.mixer.balance import balance
from xmodal.mixer.sampling import sampling
from xmodal.models import joint, lora, parts
from xmodal.options import Option, Options
from xmodal.registry import load_plugins
from xmodal.sharding import mesh
from xmodal.tasks.task import TASKS
from xmodal.train import evaluation, scoring
from xmodal.train.checkpoints import checkpoint
from xmodal.train.hooks import best, profile
from xmodal.train.logs import report
from xmodal.train.logs.trackers import tracker
from xmodal.train.optimizer import optimizer, schedules
from xmodal.train.start import settings, teacher
from xmodal.train.steps import gradient_agreement, step

_RUN = {
    'seed': Option(0, 'Seed of parameters, data order and dropout; 32 bits, as in JAX.', low=0,
                   high=2**32 - 1),
    'plugins': Option((), "Your own modules to import, such as ('my_lab.my_task',); "
                      'their parts can then be selected.')}


def sections() -> dict[str, Options]:
  """The options of each section of the config, by its path; '' is the top level."""
  found = {'': _RUN, 'model': joint.OPTIONS, 'model.lora': lora.OPTIONS}
  for slot in parts.slots():
    found[f'model.{slot}'] = {**parts.sense_options(slot), **parts.slot_options(slot)}
  found['model.text'] |= tokenizer.OPTIONS
  found |= {'data': {**data_open.OPTIONS, **SOURCES.options()},
            'data.augment': augmentation.OPTIONS,
            'mixer': {**feed.OPTIONS, **sampling.OPTIONS, **sampling.SAMPLINGS.options(),
                      **balance.OPTIONS, **balance.BALANCES.options(),
                     **gradient_agreement.OPTIONS},
            **{name: task.options for name, task in TASKS.items()},
            'train': {**step.OPTIONS, **scoring.OPTIONS, **report.OPTIONS, **checkpoint.OPTIONS,
                      **best.OPTIONS, **settings.OPTIONS, **teacher.OPTIONS, **tracker.OPTIONS,
                      **tracker.TRACKERS.options(), **profile.OPTIONS},
            'optimizer': {**optimizer.OPTIONS, **optimizer.OPTIMIZERS.options(),
                          **schedules.SCHEDULES.options()},
            'mesh': mesh.OPTIONS}
  return found


def base(plugins: Sequence[str] = ()) -> ConfigDict:
  """Every key and its default.

  Args:
    plugins: modules to import first, whose parts have keys, too.

  Raises:
    UserError: a plugin cannot be imported, or registers what another part has.
  """
  load_plugins(plugins)
  c = ConfigDict()
  for path, options in sections().items():
    if path:
      _at(c, path.rpartition('.')[0])[path.rpartition('.')[2]] = ConfigDict()
    for key, option in options.items():
      _at(c, path)[key] = option.initial
  c.plugins = tuple(plugins)
  # What a task reads instead of config.data: --config.mixer.data.detection.source=coco.
  c.mixer.data = ConfigDict({task: _unset('data') for task in TASKS})
  c.evaluations = ConfigDict()
  c.lock()
  c.evaluations.unlock()  # a config names its own: see evaluation_of
  return c


def evaluation_of(**values) -> ConfigDict:
  """One more evaluation of a run, for config.evaluations.NAME: its keys with their defaults, or the
  values given.

      c.evaluations.test = config.evaluation_of(split='test', every=5000)
  """
  c = ConfigDict({key: option.initial for key, option in evaluation.OPTIONS.items()})
  c.lock()
  c.update(values)
  return c


def _at(config, path):
  for part in filter(None, path.split('.')):
    config = config[part]
  return config


def _unset(section):
  """The keys of a section that a task may have for itself, with types and without values."""
  found = {}
  for path, options in sections().items():
    if path == section:
      found |= {key: Option(None, option.help, kind=option.type).initial
                for key, option in options.items() if key not in data_open.OF_THE_RUN}
    elif path.startswith(f'{section}.'):
      found[path.removeprefix(f'{section}.')] = _unset(path)
  return found


def keys() -> Iterator[tuple[str, Option]]:
  """Every key, such as 'vqa.beams', and its option."""
  for path, options in sections().items():
    for key, option in options.items():
      yield f'{path}.{key}'.removeprefix('.'), option


def may_change() -> frozenset[str]:
  """Keys that may change when a run is resumed or evaluated."""
  return frozenset(key for key, option in keys() if option.may_change)


def check(config: ConfigDict) -> None:
  """Raises UserError at the first value out of range or of the wrong type."""
  for key, option in keys():
    path, _, name = key.rpartition('.')
    option.check(f'config.{key}', _at(config, path)[name])
  for name, task in TASKS.items():
    task.make.check_options(config[name])
  for name, own in config.evaluations.items():
    if not isinstance(own, ConfigDict) or set(own) != set(evaluation.OPTIONS):
      raise UserError(f'config.evaluations.{name}: wanted what xmodal.config.evaluation_of() '
                      f'gives, with {", ".join(evaluation.OPTIONS)}')
    for key, option in evaluation.OPTIONS.items():
      option.check(f'config.evaluations.{name}.{key}', own[key])
  for slot in parts.slots():
    if not config.model[slot].get('pretrained'):
      parts.fields(config.model, slot)  # before any data are read


# Of which registry a key chooses a part, or a tuple of parts: (section, key, registry).
CHOICES = (
    ('data', 'source', SOURCES), ('mixer', 'sampling', sampling.SAMPLINGS),
    ('mixer', 'balance', balance.BALANCES), ('optimizer', 'name', optimizer.OPTIMIZERS),
    ('optimizer', 'schedule', schedules.SCHEDULES), ('train', 'trackers', tracker.TRACKERS))


def check_given(config: ConfigDict, given: Sequence[str]) -> None:
  """Raises UserError if a key that a person gave is of a part that the config does not choose.

  Args:
    config: the whole config.
    given: keys such as 'mixer.dwa_window'.
  """
  for key in given:
    path, _, name = key.rpartition('.')
    if path in TASKS and path not in config.mixer.tasks:
      raise UserError(f'config.{key} means nothing without {path!r} in config.mixer.tasks='
                      f'{tuple(config.mixer.tasks)}')
    for section, choice, registry in CHOICES:
      chosen = config[section][choice]
      owners = [part for part in registry if name in registry[part].options]
      names = chosen if isinstance(chosen, tuple) else (chosen,)
      if path == section and owners and not set(names) & set(owners):
        raise UserError(f'config.{key} means nothing to config.{section}.{choice}={chosen!r}; '
                        f'leave it out, or take {" or ".join(map(repr, owners))}')


def table(prefix: str = '') -> str:
  """All keys with their defaults and ranges, for people; prefix: of those wanted, such as 'vqa'."""
  lines = []
  for path, options in sections().items():
    if not f'{path}.'.startswith(prefix):
      continue
    lines.append(f'config.{path}' if path else 'config')
    for key, option in options.items():
      values = option.range()
      lines.append(f'  {key} = {option.default!r}' + (f'  ({values})' if values else ''))
      lines.append(f'      {option.help}')
  return '\n'.join(lines)


def save(config: ConfigDict, path: str) -> None:
  """Writes a config as JSON, whole or not at all."""
  with atomic.written(path) as f:
    f.write(config.to_json(indent=2) + '\n')


def load(path: str) -> ConfigDict:
  """Reads a config that save wrote, with the plugins that it names.

  Raises:
    UserError: there is none, it is damaged, it has keys that no part of this version declares, or
      a plugin cannot be imported.
  """
  if not os.path.exists(path):
    raise UserError(f'no file {path}; wanted the config.json that training writes')
  try:
    with open(path, encoding='utf-8') as f:
      values = json.load(f)
  except ValueError as error:  # not JSON, or not UTF-8
    raise UserError(f'{path} is damaged ({_line(error)}); take that of another checkpoint of the '
                    'run') from error
  plugins = values.get('plugins', ()) if isinstance(values, Mapping) else ()
  config = base(tuple(map(str, plugins)) if isinstance(plugins, list) else ())
  try:
    config.update(values)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} does not fit this version of xmodal: {_line(error)}') from error
  return config


def _line(error) -> str:
  return ' '.join(str(error.args[0] if error.args else error).split())
