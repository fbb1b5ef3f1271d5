"""Karpathy's splits of captioned pictures (Karpathy and Fei-Fei, CVPR 2015): dataset_coco.json."""

from collections.abc import Sequence
import os
from typing import Any

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.faults import Examples, fault
from xmodal.data.sources.files import (
  MissingSplit,
  check_unique,
  existing_folder,
  read_json,
  split_file,
  take_records,
)
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.source import SOURCES

_IMAGE = {'split': fields.text, 'filename': fields.path,
          'cocoid': fields.optional(fields.identifier),
          'filepath': fields.optional(fields.text, ''),
          'sentences': fields.list_of(fields.member('raw', fields.trimmed))}


@SOURCES.register('coco_karpathy')
def read_coco_karpathy(root: str, split: str) -> Examples:
  """Reads the captions of COCO 2014 in Karpathy's splits.

  The folder holds dataset_coco.json (here or in karpathy/), train2014/ and val2014/ (here or in
  images/). Layout: the files of cs.stanford.edu/people/karpathy/deepimagesent, and DATA.md of
  dandelin/ViLT.

  Args:
    root: the folder.
    split: 'train' (113,287 pictures: the file's train and restval), 'val' or 'test' (5,000 each).

  Returns:
    Examples in the order of the file, one a picture, with all of its captions; image_id is COCO's.
    Faults are empty captions, which are left out.

  Raises:
    UserError: a file or picture is missing or invalid, or a picture is listed twice.
  """
  root = existing_folder(root, 'dataset_coco.json and pictures in train2014 and val2014')
  path = split_file(root, 'dataset_coco.json', 'karpathy/dataset_coco.json')
  splits = ('train', 'restval') if split == 'train' else (split,)
  return read_karpathy(root, path, splits, ('', 'images'))


def read_karpathy(root: str, path: str, splits: Sequence[str], folders: Sequence[str]) -> Examples:
  """Reads the captions of some splits from a file of Karpathy's, see read_coco_karpathy.

  Args:
    root: absolute path of the folder of the pictures.
    path: of the file.
    splits: as the file names them.
    folders: below root, in which pictures are searched.
  """
  records = take_records(path, read_json(path, _without_tokens), _IMAGE, 'images')
  check_unique(path, 'filename', (os.path.join(folder, name) for _, name, _, folder, _ in records))
  check_unique(path, 'cocoid', (name if cocoid is None else cocoid
                                for _, name, cocoid, *_ in records))
  captions = {os.path.join(folder, name): (name if cocoid is None else cocoid, sentences)
              for split, name, cocoid, folder, sentences in records if split in splits}
  if not captions:
    found = sorted({fields.shown(split) for split, *_ in records})
    raise MissingSplit(f'{path} has no split {splits[0]!r}, wanted one of {", ".join(found)}')
  return captioned(root, path, captions, folders)


def captioned(root: str, path: str, captions: dict[str, tuple[int | str, Sequence[str]]],
              folders: Sequence[str]) -> Examples:
  """One Example a picture.

  Args:
    root: absolute path of the folder of the pictures.
    path: of the file with the captions, for messages.
    captions: name of a picture -> its image_id and captions; empty ones are left out.
    folders: below root, in which pictures are searched.
  """
  paths = find_all(root, captions, folders)
  examples, faults = [], []
  for name, (image_id, texts) in captions.items():
    filled = tuple(filter(None, texts))
    faults += [fault(f'{path}: {fields.shown(name)}', 'has an empty caption, left out')
               ] * (len(texts) - len(filled))
    examples.append(Example(paths[name], image_id=image_id, captions=filled))
  return Examples(examples, faults)


def _without_tokens(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Drops the words of captions, which are half of the file."""
  record = dict(pairs)
  record.pop('tokens', None)
  return record
