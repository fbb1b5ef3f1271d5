"""Which data set a config means."""

import os
import shlex

from xmodal import paths
from xmodal.data.answers_share import PartlyAnswered
from xmodal.data.example import Source
from xmodal.data.faults import Examples, check_left
from xmodal.data.made import Joined, check_none_made
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import ABOVE_ZERO, Option

OPTIONS = {
    'source': Option('shapes', 'Where examples come from.'),
    'root': Option('', 'Folder of the data; embedded sources need none.', may_change=True),
    'more': Option((), 'Folders whose train.jsonl is trained on too: what xmodal.augment writes.'),
    'train_split': Option('train', 'Split to train on, as the source calls it.'),
    'eval_split': Option('val', 'Split to evaluate on.', may_change=True),
    'answers_share': Option(1.0, 'Share of the training records that keep answers and reasons.',
                            low=ABOVE_ZERO, high=1),
    'image_size': Option(None, 'Pixels of both sides; None: as the vision tower says.', kind=int,
                         low=8),
    'keep_aspect': Option(False, 'Pictures keep their shape, and the rest of the input is '
                          'padding.'),
    'blank': Option('', "Hidden from the model, for baselines.", choices=('', 'image', 'question')),
    'memory_mb': Option(1024, 'MiB of a host for decoded pictures: small data sets are decoded '
                        'once.', low=0, may_change=True),
    'max_bad_share': Option(0.05, 'Share of unreadable pictures above which training stops.', low=0,
                            high=1, may_change=True)}
# Keys of data that all tasks share: the model's input, and memory of the host.
OF_THE_RUN = ('image_size', 'memory_mb')
# Pixels of both sides, for a vision tower that begins from nothing, where the config names none.
IMAGE_SIZE = 48


def open_source(config, split: str, *, train: bool, only_answered: bool = False) -> Source:
  """Opens one split of the data set that config.data names, for training with what config.data.more
  adds to it.

  Args:
    config: the whole config.
    split: name of the split, as the source calls it.
    train: whether to train on it: config.data.answers_share and more hold then; of the embedded
      data also whether to give the training number of examples, and to leave out what
      config.data.without names.
    only_answered: whether records that answers_share takes the answers of are of no use.

  Raises:
    UserError: there is no such source, folder, file or split, nothing in it to
      train on, nothing can be left out of it, or what is to be evaluated on was made by a model.
  """
  source = _open(config, split, train)
  if not train:
    check_none_made(source, f'{config.data.root}, {split!r}')
    return source
  if (share := config.data.answers_share) < 1:
    part = PartlyAnswered(source, share, config.seed, only=only_answered)
    source = Examples(part, getattr(source, 'faults', ())) if isinstance(source, list) else part
  for folder in config.data.more:
    path = os.path.join(paths.local(folder, 'config.data.more:'), 'train.jsonl')
    if not os.path.isfile(path):
      raise UserError(f'config.data.more: no train.jsonl in {folder!r}; wanted folders that '
                      'xmodal.augment wrote')
  more = [SOURCES['jsonl'].make(folder, 'train') for folder in config.data.more]
  return Joined([source, *more]) if more else source


def _open(config, split, train):
  data = config.data
  source = SOURCES[data.source]
  options = {key: data[key] for key in source.options}
  if source.facts.get('embedded'):
    if data.root:
      raise UserError(f'config.data.root={data.root!r} means nothing to config.data.source='
                      f'{data.source!r}; set that, too: {", ".join(SOURCES)}')
    return source.make(split, train=train, image_size=data.image_size or IMAGE_SIZE, **options)
  if not data.root:
    raise UserError(f'config.data.source={data.source!r} needs config.data.root, the folder of the '
                    'data')
  opened = source.make(data.root, split, **options)
  if train and source.facts.get('boxes'):
    check_left(opened, f'{data.root}, {split!r}', check_flags(config, split))
  return opened


def check_flags(config, split: str) -> str:
  """What follows `xmodal check` to look at one split of a config's data."""
  return f'{shlex.quote(config.data.root)} --source {config.data.source} --split {split}'
