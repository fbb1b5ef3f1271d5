"""A folder of pictures for each class, as torchvision's ImageFolder and `datasets` read it."""

import os

from xmodal import storage
from xmodal.data.faults import Examples
from xmodal.data.fields import Complaint
from xmodal.data.sources import columns, parquet
from xmodal.data.sources.columns import Rows
from xmodal.data.sources.csv import add_table
from xmodal.data.sources.files import MissingSplit, existing_folder, is_utf8, split_names
from xmodal.data.sources.find_pictures import picture_files
from xmodal.data.sources.jsonl import json_object, numbered_lines
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_METADATA = ('metadata.csv', 'metadata.jsonl', 'metadata.parquet')
_WANTED = 'SPLIT/CLASS/PICTURE, such as train/cat/1.jpg'


@SOURCES.register('imagefolder', options=columns.OPTIONS | columns.QUESTION)
def read_imagefolder(root: str, split: str, fields: tuple = (),
                     question: str = columns.WHAT) -> Examples:
  """Reads {root}/{split}/CLASS/: each picture is an example whose answer is its class.

  If there are metadata.csv, .jsonl or .parquet in the split's folder or below, each of their rows
  is an example instead, as in `datasets`: file_name is the path of a picture from the folder of
  the metadata, and other columns fill the fields of a line of jsonl.

  Args:
    root, split: see xmodal.data.sources.source; val may also be named validation.
    fields, question: see xmodal.data.sources.columns.

  Returns:
    Examples in the order of their paths.

  Raises:
    UserError: no such folder, no pictures in it, pictures beside the folders of classes, or bad
      rows of metadata.
  """
  root = existing_folder(root, _WANTED)
  folder = _find(root, split)
  rows = Rows(root, fields, 'imagefolder', question)
  metadata = sorted(path for path in _files(folder) if os.path.basename(path) in _METADATA)
  for path in metadata:
    _add_metadata(rows, path, root)
  if not metadata:
    if fields:
      raise UserError(f'config.data.fields={fields!r}: {folder} has no {" or ".join(_METADATA)} '
                      'whose columns it could name')
    _add_classes(rows, folder)
  return rows.examples(folder)


def _find(root, split):
  for name in split_names(split):
    folder = os.path.join(root, name)
    if storage.is_dir(folder):
      return folder
  there = sorted(name for name in storage.list_dir(root)
                 if storage.is_dir(os.path.join(root, name)))
  raise MissingSplit(f'{root}: no folder {split!r}, wanted {_WANTED}; folders there: '
                     f'{", ".join(there[:5]) or "none"}{", ..." if there[5:] else ""}')


def _files(folder):
  if storage.is_remote(folder):
    return [os.path.join(folder, name) for name in storage.walk(folder)]
  return [os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True)
          for name in names]


def _add_classes(rows, folder):
  for path in picture_files(folder):
    name, *rest = os.path.relpath(path, folder).split(os.sep)
    if not rest:
      raise UserError(f'{path}: is in no folder of a class, wanted {_WANTED}, or '
                      f'{" or ".join(_METADATA)}')
    if not is_utf8(path):
      raise UserError(f'{path!r}: its name is not UTF-8; rename it')
    rows.add({'image': path, 'answers': [name]}, path)


def _add_metadata(rows, path, root):
  folder = os.path.relpath(os.path.dirname(path), root)
  if path.endswith('.csv'):
    add_table(rows, path, image='file_name', folder=folder)
    return
  records = _records(rows, path)
  names = dict.fromkeys(key for record in records.values() for key in record)
  found = rows.columns(names, path, 'file_name') if records else {}
  for where, record in records.items():
    record = {field: record.get(column) for field, column in found.items()}
    if isinstance(record['image'], str) and record['image']:
      record['image'] = os.path.join(folder, record['image'])
    rows.add(record, where)


def _records(rows, path):
  """The place of each row -> its columns."""
  if path.endswith('.parquet'):
    return {f'{path}: row {n}': record for n, record in enumerate(parquet.each_row(path))}
  records = {}
  for number, line in numbered_lines(path):
    try:
      records[f'{path}:{number}'] = json_object(line)
    except Complaint as complaint:
      rows.add_bad(str(complaint), f'{path}:{number}')
  return records
