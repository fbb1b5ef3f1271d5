"""Finding and reading the files of a data set, and saying in one line what is wrong with them."""

import errno
import json
import os
from collections.abc import Callable
from typing import Any

from xmodal import paths
from xmodal.errors import UserError

# These say that a path names nothing; other errors, that it cannot be looked up.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class MissingSplit(UserError):
  """A data set has no such split."""


class Pictures:
  """Knows which files exist below a folder, listing each folder once."""

  def __init__(self, root: str):
    self.root = root
    self._names: dict[str, frozenset[str]] = {}

  def find(self, name: str) -> str | None:
    """The absolute path of a file named from the root, None where there is none.

    Raises:
      UserError: the folder of the file may not be listed.
    """
    path = os.path.join(self.root, name)
    folder, base = os.path.split(path)
    if folder not in self._names:
      self._names[folder] = _file_names(folder)
    return path if base in self._names[folder] else None


def existing_folder(root: str, wanted: str) -> str:
  """The absolute path of a data folder; UserError if there is none or it is empty."""
  path = paths.local(root, 'data folder')
  if not root or not os.path.isdir(path):
    found = 'is a file' if os.path.isfile(path) else 'is not there'
    raise UserError(f'data folder {root!r} {found}, wanted a folder with {wanted}; '
                    'set config.data.root')
  try:
    filled = os.listdir(path)
  except OSError as error:
    raise unreadable(path, error) from None
  if not filled:
    raise UserError(f'data folder {path} is empty, wanted {wanted}; set config.data.root')
  return path


def read_json(path: str, object_pairs_hook: Callable[[list[tuple]], Any] | None = None) -> Any:
  """What a JSON file holds; the hook is json.load's.

  Raises:
    UserError: no such file, or broken JSON (with its place).
  """
  try:
    with open(path, encoding='utf-8-sig') as file:
      return json.load(file, object_pairs_hook=object_pairs_hook)
  except FileNotFoundError:
    raise UserError(f'{path}: no such file, wanted it as distributed') from None
  except json.JSONDecodeError as error:
    raise UserError(f'{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}, '
                    f'character {error.pos}); is the download complete?') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8; is it the right file?') from None
  except OSError as error:
    raise unreadable(path, error) from None


def read_records(path: str, names: tuple[str, ...], key: str = '') -> list[tuple]:
  """The named fields of each record of a JSON list (of the list under key, if given).

  Raises:
    UserError: as read_json and take_records.
  """
  return take_records(path, read_json(path), names, key)


def take_records(path: str, content: Any, names: tuple[str, ...], key: str = '') -> list[tuple]:
  """As read_records, of what read_json(path) has read.

  Raises:
    UserError: no such list, nothing in it, or a record that lacks a field.
  """
  where = f'a list under {key!r}' if key else 'a list'
  records = content
  if key:
    records = content.get(key) if isinstance(content, dict) else None
  if not isinstance(records, list) or not records:
    raise UserError(f'{path}: wanted {where} with at least one record, found {shown(records)}')
  try:
    return [tuple(record[name] for name in names) for record in records]
  except (KeyError, TypeError):
    number = next(i for i, record in enumerate(records)
                  if not isinstance(record, dict) or not record.keys() >= set(names))
    raise UserError(f'{path}: record {number} (from 0) is {shown(records[number])}, '
                    f'wanted the fields {", ".join(names)}') from None


def check_present(missing: list[str], total: int, folder: str) -> None:
  """Raises UserError if any of the pictures that a data set names is missing."""
  if missing:
    raise UserError(f'{len(missing)} of {total} pictures are not in {folder}, such as '
                    f'{missing[0]}; unpack the pictures there')


def unreadable(path: str, error: OSError) -> UserError:
  """What to raise where a file or folder is there and may not be read."""
  return UserError(f'{path}: cannot be read ({error.strerror}); let this user read it')


def shown(value: Any) -> str:
  """A value found in a file, short enough for one line."""
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def _file_names(folder):
  try:
    with os.scandir(folder) as entries:
      return frozenset(entry.name for entry in entries if _is_file(entry))
  except ValueError:  # a NUL in the name
    return frozenset()
  except OSError as error:
    if error.errno in _NOTHING_THERE:
      return frozenset()
    raise unreadable(folder, error) from None


def _is_file(entry):
  try:
    return entry.is_file()
  except OSError:  # a link to itself, or into a folder that may not be read
    return False
