"""Parquet: tables with their pictures inside, as the Hugging Face hub stores data sets."""

import collections
from collections.abc import Iterator
import concurrent.futures
import functools
import json
import logging
import threading
from typing import Any, NamedTuple

from xmodal import storage
from xmodal.data.example import Packed
from xmodal.data.faults import Examples
from xmodal.data.fields import Complaint, shown
from xmodal.data.sources import columns
from xmodal.data.sources.columns import Rows
from xmodal.data.sources.files import existing_folder, shards
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

# Pictures of the row groups that were read last; one group is kept whatever its size.
_KEPT_BYTES = 256 * 2**20
_LARGE_GROUP = 64 * 2**20


@SOURCES.register('parquet', options=columns.OPTIONS | columns.QUESTION)
def read_parquet(root: str, split: str, fields: tuple = (),
                 question: str = columns.WHAT) -> Examples:
  """Reads {split}.parquet or {split}-*.parquet, in the folder or its data/: a row is an example.

  Columns fill the fields of a line of jsonl. The column of pictures holds paths from the folder,
  the bytes of picture files, or structs of bytes and path (the feature Image of `datasets`).
  Numbers of classes are replaced by their names where `datasets` stored these (ClassLabel).

  All columns but the bytes of pictures are read here. Those are read when a picture is decoded,
  with its row group: files of a few hundred rows a group are read fastest in random order.

  Args:
    root, split: see xmodal.data.sources.source; val may also be named validation.
    fields, question: see xmodal.data.sources.columns.

  Returns:
    Examples in the order of the rows of the files, which are sorted by name.

  Raises:
    UserError: no such files, they are damaged, a column is not there, or bad rows.
  """
  root = existing_folder(root, 'train.parquet or data/train-*.parquet')
  rows, groups = Rows(root, fields, 'parquet', question), _Groups()
  for path in shards(root, split, '.parquet'):
    _add_file(rows, path, groups)
  return rows.examples(f'{root}, {split!r}')


def each_row(path: str) -> Iterator[dict[str, Any]]:
  """Yields the rows of a file that has no pictures inside; UserError if it cannot be read."""
  file = _open(path)
  for group in range(file.num_row_groups):
    yield from _read(path, file, group, None).to_pylist()


def _add_file(rows, path, groups):
  file = _open(path)
  schema = file.schema_arrow
  found = rows.columns(schema.names, path)
  image = found.pop('image')
  kind = _kind(path, image, schema.field(image).type)
  classes = {field: names for field, column in found.items()
             if (names := _class_names(schema).get(column))}
  texts = [*found.values(), *kind.paths]
  number = 0
  for group in range(file.num_row_groups):
    is_packed = _packed(path, file, group, kind)
    for row, record in enumerate(_read(path, file, group, texts).to_pylist()):
      where = f'{path}: row {number}'
      number += 1
      values = {field: record[column] for field, column in found.items()}
      if is_packed[row]:
        values['image'] = Packed(where, functools.partial(groups.picture, path, group, row, kind))
      else:
        value = record.get(image)
        values['image'] = value.get('path') if isinstance(value, dict) else value
      try:
        values |= {field: _class_name(values[field], names) for field, names in classes.items()}
      except Complaint as complaint:
        rows.add_bad(str(complaint), where)
        continue
      rows.add(values, where)


class _Kind(NamedTuple):
  """Where a column has pictures.

  Attributes:
    bytes: the leaf that holds the bytes of picture files, '' if none does.
    paths: the leaves that hold paths, at most one.
  """

  bytes: str
  paths: list[str]


def _kind(path, column, type_):
  import pyarrow.types as types

  if types.is_string(type_) or types.is_large_string(type_):
    return _Kind('', [column])
  if types.is_binary(type_) or types.is_large_binary(type_):
    return _Kind(column, [])
  names = {type_.field(n).name for n in range(type_.num_fields)} if types.is_struct(type_) else {}
  if not {'bytes', 'path'} & set(names):
    raise UserError(f'{path}: column {column!r} is {shown(str(type_))}, wanted pictures: paths, '
                    'bytes, or structs of bytes and path')
  return _Kind(f'{column}.bytes' if 'bytes' in names else '',
               [f'{column}.path'] if 'path' in names else [])


def _packed(path, file, group, kind):
  """Which rows of a group hold the bytes of their pictures."""
  metadata = file.metadata.row_group(group)
  if not kind.bytes:
    return [False] * metadata.num_rows
  leaf = next(metadata.column(n) for n in range(metadata.num_columns)
              if metadata.column(n).path_in_schema == kind.bytes)
  if not group and leaf.total_uncompressed_size > _LARGE_GROUP:
    logging.getLogger(__name__).warning(
        '%s: its first row group has %d MiB of pictures, and all are read for one; write the file '
        'with fewer rows a group', path, leaf.total_uncompressed_size >> 20)
  counts = leaf.statistics
  if not kind.paths or counts is None or not counts.has_null_count or not counts.null_count:
    return [True] * metadata.num_rows
  return [value is not None for value in _bytes_of(_read(path, file, group, [kind.bytes]), kind)]


def _bytes_of(table, kind):
  column = table.column(0)
  return [None if value is None else value.get('bytes') if isinstance(value, dict) else value
          for value in column.to_pylist()]


class _Groups:
  """The pictures of the row groups that were read last. Thread-safe."""

  def __init__(self):
    self._lock = threading.Lock()
    self._kept: collections.OrderedDict[tuple, concurrent.futures.Future] = (
        collections.OrderedDict())

  def __reduce__(self):
    return _Groups, ()  # another process reads anew

  def picture(self, path: str, group: int, row: int, kind: _Kind) -> bytes:
    """The bytes of one picture.

    Raises:
      UserError: the file is damaged, or the row has no picture.
    """
    key = path, group
    with self._lock:
      future = self._kept.get(key)
      is_first = future is None
      if is_first:  # later threads wait for this one
        future = self._kept[key] = concurrent.futures.Future()
      self._kept.move_to_end(key)
    if is_first:
      try:
        future.set_result(_bytes_of(_read(path, _open(path), group, [kind.bytes]), kind))
      except BaseException as error:
        future.set_exception(error)
        with self._lock:
          self._kept.pop(key, None)
      self._shrink()
    found = future.result()[row]
    if found is None:
      raise UserError(f'{path}: row {row} of row group {group} has no picture')
    return found

  def _shrink(self):
    with self._lock:
      done = [(key, sum(len(one or b'') for one in future.result()))
              for key, future in self._kept.items() if future.done() and not future.exception()]
      size = sum(bytes_ for _, bytes_ in done)
      for key, bytes_ in done[:-1]:  # the oldest first
        if size <= _KEPT_BYTES:
          break
        del self._kept[key]
        size -= bytes_


def _open(path):
  try:
    import pyarrow.parquet as pq
  except ImportError:
    raise UserError(f"{path}: needs pyarrow: pip install 'xmodal[parquet]', or pip install pyarrow"
                    ) from None
  try:
    if storage.is_remote(path):
      return pq.ParquetFile(storage.RangeFile(path), pre_buffer=True)
    return pq.ParquetFile(path)
  except UserError:  # of a bucket
    raise
  except (ValueError, OSError) as error:  # pyarrow's own errors are of these
    raise _damaged(path, error) from None


def _read(path, file, group, leaves):
  """The columns of a row group, without pyarrow's own threads: batches are made in threads."""
  try:
    return file.read_row_group(group, columns=leaves, use_threads=False)
  except UserError:
    raise
  except (ValueError, OSError) as error:
    raise _damaged(f'{path}: row group {group}', error) from None


def _damaged(where, error):
  if isinstance(error, PermissionError):
    return UserError(f'{where}: cannot be read; give this user permission')
  return UserError(f'{where}: damaged, or no Parquet ({" ".join(str(error).split())}); is the '
                   'download complete?')


def _class_names(schema) -> dict[str, list[str]]:
  """Column -> the names of its classes, which `datasets` stores beside the table."""
  try:
    stored = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
    features = stored['info']['features']
  except (ValueError, KeyError, TypeError):
    return {}
  found = {}
  for column, feature in features.items() if isinstance(features, dict) else ():
    while isinstance(feature, dict) and 'feature' in feature:  # a list of classes
      feature = feature['feature']
    if isinstance(feature, dict) and feature.get('_type') == 'ClassLabel':
      found[column] = feature.get('names')
  return found


def _class_name(value: Any, names: list[str]) -> Any:
  """The names of one or several classes given by number; None for -1, which is no class."""
  if isinstance(value, list):
    return [_class_name(one, names) for one in value]
  if value is None or value == -1:
    return None
  if not isinstance(value, int) or not 0 <= value < len(names):
    raise Complaint(f'class {shown(value)} has no name, wanted a number of 0 to {len(names) - 1}')
  return names[value]
