"""Which data set a config means."""

import os
import shlex

from xmodal import paths
from xmodal.config import IMAGE_SIZE
from xmodal.data.answers_share import PartlyAnswered
from xmodal.data.example import Source
from xmodal.data.faults import Examples, check_left
from xmodal.data.made import Joined, check_none_made
from xmodal.data.scenes import crowds, shapes
from xmodal.data.scenes import drawings as shape_drawings
from xmodal.data.scenes import numbers as shape_numbers
from xmodal.data.sources import coco, jsonl, visual_genome, voc, vqa_rad, vqa_v2
from xmodal.errors import UserError

READERS = {'jsonl': jsonl.read_jsonl, 'vqa_v2': vqa_v2.read_vqa_v2,
           'vqa_rad': vqa_rad.read_vqa_rad, 'coco': coco.read_coco, 'voc': voc.read_voc,
           'visual_genome': visual_genome.read_visual_genome}
_SCENES = {'crowded': crowds.Crowds, 'numbers': shape_numbers.Numbers,
           'drawn': shape_drawings.Drawings}
_OF_BOXES = ('coco', 'voc', 'visual_genome')


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
  more = [jsonl.read_jsonl(folder, 'train') for folder in config.data.more]
  return Joined([source, *more]) if more else source


def _open(config, split, train):
  data = config.data
  if data.source == 'shapes':
    if data.root:
      raise UserError(f"config.data.root={data.root!r} means nothing to config.data.source='shapes'"
                      f'; set that, too: {", ".join(READERS)}')
    options = dict(size=data.train_examples if train else data.eval_examples,
                   image_size=data.image_size or IMAGE_SIZE, seed=0)
    kinds = [kind for kind in _SCENES if data[kind]]
    if len(kinds) > 1:
      raise UserError(f'config.data.{kinds[0]}=True and config.data.{kinds[1]}=True are two kinds '
                      'of scenes; set one of them to False')
    kind = kinds[0] if kinds else ''
    if kind in ('crowded', 'drawn'):
      return _SCENES[kind](split, **options, without=tuple(data.without) if train else ())
    if data.without:
      raise UserError(f'config.data.without={tuple(data.without)}: nothing can be left out of the '
                      'scenes with questions; set config.data.crowded=True or '
                      'config.data.drawn=True')
    return _SCENES.get(kind, shapes.Shapes)(split, **options)
  if data.source not in READERS:
    raise UserError(f'config.data.source={data.source!r}: wanted one of '
                    f'{", ".join(["shapes", *READERS])}')
  if not data.root:
    raise UserError(f'config.data.source={data.source!r} needs config.data.root, the folder of the '
                    'data')
  source = READERS[data.source](data.root, split)
  if train and data.source in _OF_BOXES:
    check_left(source, f'{data.root}, {split!r}', check_flags(config, split))
  return source


def check_flags(config, split: str) -> str:
  """What follows `xmodal check` to look at one split of a config's data."""
  return f'{shlex.quote(config.data.root)} --source {config.data.source} --split {split}'
