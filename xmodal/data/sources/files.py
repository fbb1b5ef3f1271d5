"""Reads the files of a data set, and reports faults in one line."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
import json
import os
import re
from typing import Any

from xmodal import paths, storage
from xmodal.data.fields import Check, Complaint, check_fields, shown
from xmodal.data.sources import json_stream
from xmodal.errors import UserError

# Split -> its names in published data sets, as `datasets` knows them.
_SPLIT_NAMES = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid', 'dev'),
                'test': ('test', 'testing')}


class MissingSplit(UserError):
  """The data set has no such split."""


def split_names(split: str) -> tuple[str, ...]:
  """The names that a split may have in files: its own, then the usual ones ('validation')."""
  return tuple(dict.fromkeys((split, *_SPLIT_NAMES.get(split, ()))))


def shards(root: str, split: str, ending: str) -> list[str]:
  """The files of a split, which may be divided into several, sorted.

  Looks in the folder and in its data/, for SPLIT.ending, SPLIT-*.ending and SPLIT/*.ending; then
  for names with SPLIT between dashes, underscores, dots, spaces or digits (set-train-0001.tar).

  Args:
    root: the folder.
    split: such as 'val'; its files may be named 'validation'.
    ending: such as '.parquet'.

  Raises:
    MissingSplit: there are none.
  """
  folders = (root, os.path.join(root, 'data'))
  names = '|'.join(map(re.escape, split_names(split)))
  end = re.escape(ending)
  for places, pattern in (
      (folders, rf'({names})(-.*)?{end}'),
      ([os.path.join(folder, name) for folder in folders for name in split_names(split)],
       rf'.*{end}'),
      (folders, rf'(.*[-_. \d])?({names})([-_. \d].*)?{end}')):
    for place in places:
      if found := [file for file in _listed(place) if re.fullmatch(pattern, file)]:
        return [os.path.join(place, file) for file in found]
  there = [file for file in _listed(root) + _listed(os.path.join(root, 'data'))
           if file.endswith(ending)]
  raise MissingSplit(f'{root} has no files of {split!r}, wanted {split}{ending}, {split}-*{ending} '
                     f'or {split}/*{ending}, also in data/; {ending} files there: '
                     f'{", ".join(there[:5]) or "none"}{", ..." if there[5:] else ""}')


def _listed(folder):
  """The names in a folder, sorted; [] if it does not exist."""
  try:
    return sorted(storage.list_dir(folder))
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise unreadable(folder, error) from None


def existing_folder(root: str, wanted: str) -> str:
  """The absolute path or the address of a data folder; UserError if it is missing or empty."""
  path = paths.resolved(root, 'data folder')
  if storage.is_remote(path):
    if not storage.list_dir(path):
      found = 'is a file' if storage.is_file(path) else 'is not there'
      raise UserError(f'data folder {path} {found}, wanted a folder with {wanted}; '
                      'set config.data.root')
    return path
  if not root or not os.path.isdir(path):
    found = 'is a file' if os.path.isfile(path) else 'is not there'
    raise UserError(f'data folder {root!r} {found}, wanted a folder with {wanted}; '
                    'set config.data.root')
  if not is_utf8(path):
    raise UserError(f'data folder {path!r}: its name is not UTF-8; rename it')
  try:
    filled = os.listdir(path)
  except OSError as error:
    raise unreadable(path, error) from None
  if not filled:
    raise UserError(f'data folder {path} is empty, wanted {wanted}; set config.data.root')
  return path


def check_split(title: str, split: str, splits: Iterable[str]) -> None:
  """Raises MissingSplit if a data set, named by its title, does not have the split."""
  if split not in (splits := tuple(splits)):
    raise MissingSplit(f'{title} has no split {split!r}, wanted one of {", ".join(splits)}')


def split_file(root: str, *names: str) -> str:
  """The path of the first of these files below root that exists; MissingSplit if none does."""
  for name in names:
    if storage.is_file(path := os.path.join(root, name)):
      return path
  others = f', there or as {" or ".join(names[1:])}' if names[1:] else ''
  raise MissingSplit(f'{os.path.join(root, names[0])}: no such file, wanted it as distributed'
                     f'{others}')


def read_json(path: str, object_pairs_hook: Callable[[list[tuple]], Any] | None = None) -> Any:
  """Parses a JSON file; object_pairs_hook as in json.load.

  Raises:
    UserError: no such file, or broken JSON (with its line and column).
  """
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      return json.load(file, object_pairs_hook=object_pairs_hook)
  except FileNotFoundError:
    raise UserError(f'{path}: no such file, wanted it as distributed') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}, '
                    f'character {error.pos}); is the download complete?') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8; is it the right file?') from None
  except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, nesting of 1,000
    raise UserError(f'{path}: not readable JSON ({error}); is it the right file?') from None
  except OSError as error:
    raise unreadable(path, error) from None


def read_records(path: str, checks: Mapping[str, Check], key: str = '') -> list[tuple]:
  """Reads and checks the fields of each record of a JSON list (the list under key, if given).

  The parsed records are not held in memory together, unless one of them is invalid. A file of a
  bucket is downloaded whole.

  Raises:
    UserError: as read_json and take_records.
  """
  taken, each = [], tuple(checks.items())
  try:
    for record in json_stream.records(path, key):
      taken.append(tuple([check(record.get(field)) for field, check in each]))
    if taken:
      return taken
  except (json_stream.Irregular, Complaint, AttributeError):
    pass
  return take_records(path, read_json(path), checks, key)  # says what is wrong


def each_record(path: str, what: str) -> Iterator[Any]:
  """Yields the parsed items of a JSON file that is a list; one is in memory at a time.

  Args:
    path: the file.
    what: the items in words, for messages.

  Raises:
    UserError: as read_json, perhaps after some items; or the file is no list.
  """
  try:
    yield from json_stream.records(path)
  except json_stream.Irregular:
    read_json(path)  # says what is wrong, unless it is no list
    raise UserError(f'{path}: wanted a list of {what}, as distributed') from None


def take_records(path: str, content: Any, checks: Mapping[str, Check], key: str = ''
                 ) -> list[tuple]:
  """As read_records, for a file that read_json has already parsed.

  Args:
    path: path of the file, for messages.
    content: its parsed content.
    checks: field -> its check, see xmodal.data.fields.
    key: key of the list in the content.

  Raises:
    UserError: no such list, an empty list, or a record with an invalid field.
  """
  where = f'a list under {key!r}' if key else 'a list'
  records = content
  if key:
    records = content.get(key) if isinstance(content, dict) else None
  if not isinstance(records, list) or not records:
    raise UserError(f'{path}: wanted {where} with at least one record, found {shown(records)}')
  taken = []
  for place, record in enumerate(records):
    where = f'{path}: record {place} (from 0)'
    if not isinstance(record, dict):
      raise UserError(f'{where} is {shown(record)}, wanted the fields {", ".join(checks)}')
    values, complaints = check_fields(record, checks)
    if complaints:
      raise UserError(f'{where}: {"; ".join(complaints)}')
    taken.append(tuple(values.values()))
  return taken


def check_unique(path: str, field: str, values: Iterable[Hashable]) -> None:
  """Raises UserError if two records have the same value in a field that other records refer to."""
  first = {}
  for place, value in enumerate(values):
    if first.setdefault(value, place) != place:
      raise UserError(f'{path}: records {first[value]} and {place} (from 0) both have {field} '
                      f'{shown(value)}, wanted a unique one for each; references to it are '
                      'ambiguous')


def unreadable(path: str, error: OSError) -> UserError:
  """The error for a file or folder that exists but cannot be read."""
  return UserError(f'{path}: cannot be read ({error.strerror or error}); give this user permission')


def is_utf8(name):
  """Whether a file's name is valid UTF-8: Python decodes other bytes as lone surrogates."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return False
  return True
