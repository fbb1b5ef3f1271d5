"""Opens the data set that a config names."""

import os
import shlex

from xmodal import paths, storage
from xmodal.data.answers_share import PartlyAnswered
from xmodal.data.example import Source
from xmodal.data.faults import Examples, check_left
from xmodal.data.made import Concatenated, check_none_made
from xmodal.data.sources.source import SOURCES
from xmodal.data.uncollected import uncollected
from xmodal.errors import UserError
from xmodal.options import ABOVE_ZERO, Option

OPTIONS = {
    'source': Option('shapes', 'Where examples come from.'),
    'root': Option('', 'Folder of the data; embedded sources need none.', may_change=True),
    'more': Option((), 'Folders of xmodal augment; their train.jsonl is added to training.'),
    'train_split': Option('train', "Split to train on, by the source's name for it."),
    'eval_split': Option('val', 'Split to evaluate on.', may_change=True),
    'answers_share': Option(1.0, 'Share of the training records that keep answers and reasons.',
                            low=ABOVE_ZERO, high=1),
    'image_size': Option(None, 'Height and width in pixels; None: that of the vision tower.',
                         kind=int, low=8),
    'keep_aspect': Option(False, 'Keep the aspect ratio of pictures and pad the rest of the '
                          'input.'),
    'blank': Option('', "Input to hide from the model, for baselines.",
                    choices=('', 'image', 'question')),
    'memory_mb': Option(1024, 'MiB per host to cache decoded pictures; small data sets are then '
                        'decoded once.', low=0, may_change=True),
    'workers': Option(None, 'Processes that read ahead; 0: threads. None: threads if '
                      'the model is on the CPU, or else a process for each core but two.', kind=int,
                      low=0, may_change=True),
    'max_bad_share': Option(0.05, 'Share of unreadable pictures above which training stops.', low=0,
                            high=1, may_change=True)}
# Keys of config.data that all tasks share: the model's input, the host's memory and cores.
OF_THE_RUN = ('image_size', 'memory_mb', 'workers')
# Default height and width in pixels for a vision tower trained from scratch.
IMAGE_SIZE = 48


@uncollected()
def open_source(config, split: str, *, train: bool, only_answered: bool = False) -> Source:
  """Opens one split of the data set that config.data names; for training, adds config.data.more.

  Args:
    config: the whole config.
    split: name of the split, as defined by the source.
    train: whether to train on it. If so, config.data.answers_share and more apply; embedded data
      also have the training number of examples, and leave out the names in config.data.without.
    only_answered: whether to drop the records that answers_share leaves without answers.

  Raises:
    UserError: there is no such source, folder, file or split, nothing in it to train on, nothing
      can be left out of it, or a model made examples to evaluate on.
  """
  source = _open(config, split, train)
  if not train:
    check_none_made(source, f'{config.data.root}, {split!r}')
    return source
  if (share := config.data.answers_share) < 1:
    part = PartlyAnswered(source, share, config.seed, only=only_answered)
    source = Examples(part, getattr(source, 'faults', ())) if isinstance(source, list) else part
  for folder in config.data.more:
    path = os.path.join(paths.resolved(folder, 'config.data.more:'), 'train.jsonl')
    if not storage.is_file(path):
      raise UserError(f'config.data.more: no train.jsonl in {folder!r}; wanted folders that '
                      'xmodal augment wrote')
  more = [SOURCES['jsonl'].make(folder, 'train') for folder in config.data.more]
  return Concatenated([source, *more]) if more else source


def _open(config, split, train):
  data = config.data
  source = SOURCES[data.source]
  options = {key: data[key] for key in source.options}
  if source.facts.get('embedded'):
    if data.root:
      raise UserError(f'config.data.root={data.root!r} means nothing to config.data.source='
                      f'{data.source!r}; set that, too: {", ".join(SOURCES)}')
    return source.make(split, train=train, image_size=data.image_size or IMAGE_SIZE, **options)
  if not data.root and not (source.facts.get('named') and data.name):
    raise UserError(f'config.data.source={data.source!r} needs config.data.root, the folder of the '
                    'data')
  opened = source.make(data.root, split, **options)
  if train and source.facts.get('boxes'):
    check_left(opened, f'{data.root}, {split!r}', check_flags(config, split))
  return opened


def check_flags(config, split: str) -> str:
  """The arguments of `xmodal check` for one split of a config's data."""
  data = config.data
  own = [shlex.quote(f'--config.data.{key}={data[key]}')
         for key, option in SOURCES[data.source].options.items() if data[key] != option.default]
  return ' '.join([f'{shlex.quote(data.root)} --source {data.source} --split {shlex.quote(split)}',
                   *own])
