"""Finding and reading the files of a data set, and saying in one line what is wrong with them."""

import dataclasses
import errno
import functools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any
import unicodedata

from PIL import Image

from xmodal import paths
from xmodal.data.fields import Check, check_fields, shown
from xmodal.errors import UserError

# These say that a path names nothing; other errors, that it cannot be looked up.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class MissingSplit(UserError):
  """A data set has no such split."""


class Pictures:
  """Knows which files exist below a folder, listing each folder once.

  A name that is not there as written is found with its backslashes as slashes, and
  whether its accents are letters of their own or marks after letters: Windows writes
  the former, macOS names files the latter way (Unicode normal forms C and D).
  """

  def __init__(self, root: str):
    self.root = root
    self._listings: dict[str, _Listing] = {}

  def find(self, name: str) -> str | None:
    """The absolute path of a file named from the root, None where there is none.

    Raises:
      UserError: the folder of the file may not be listed.
    """
    path = os.path.join(self.root, name)
    folder, base = os.path.split(path)
    if base in self._listing(folder).files:
      return path
    if name.isascii() and '\\' not in name:
      return None
    folder, base = self._split(name)
    found = self._listing(folder).alike.get(_composed(base))
    return found and os.path.join(folder, found)

  def find_ending(self, name: str, first: Sequence[str]) -> str | None:
    """As find, of a picture that is named without its ending.

    Args:
      name: all before the ending.
      first: endings that are looked for first, in this order; then any that Pillow knows.
    """
    exact = next((path for end in first if (path := self.find(name + end))), None)
    if exact:
      return exact
    folder, base = self._split(name)
    found = self._listing(folder).pictures.get(_composed(base))
    return found and os.path.join(folder, found)

  def hint(self) -> str:
    """What may be why a picture is not found, '' if nothing is known."""
    names = (name for listing in self._listings.values() for name in sorted(listing.files))
    odd = next((name for name in names if not _is_utf8(name)), '')
    return odd and f'; names there are not UTF-8, such as {odd!r}: rename those files'

  def _split(self, name):
    """The folder as it is named on disk, and the rest of a name."""
    *folders, base = name.replace('\\', '/').split('/')
    path = os.sep if folders and not folders[0] else self.root
    for folder in filter(None, folders):
      there = os.path.join(path, folder)
      if not os.path.isdir(there):
        there = os.path.join(path, self._listing(path).folders.get(_composed(folder), folder))
      path = there
    return path, base

  def _listing(self, folder):
    if folder not in self._listings:
      self._listings[folder] = _list_folder(folder)
    return self._listings[folder]


@dataclasses.dataclass(frozen=True)
class _Listing:
  """The names in a folder."""

  files: frozenset[str]
  others: frozenset[str]

  @functools.cached_property
  def alike(self):
    """Files by what their names have in common with other spellings."""
    return {_composed(name): name for name in sorted(self.files)}

  @functools.cached_property
  def folders(self):
    return {_composed(name): name for name in sorted(self.others)}

  @functools.cached_property
  def pictures(self):
    """Files that Pillow may open, by their names without the ending."""
    endings = Image.registered_extensions()
    parts = {name: os.path.splitext(name) for name in sorted(self.files, reverse=True)}
    return {_composed(stem): name for name, (stem, end) in parts.items() if end.lower() in endings}


def _composed(name):
  return unicodedata.normalize('NFC', name)


def existing_folder(root: str, wanted: str) -> str:
  """The absolute path of a data folder; UserError if there is none or it is empty."""
  path = paths.local(root, 'data folder')
  if not root or not os.path.isdir(path):
    found = 'is a file' if os.path.isfile(path) else 'is not there'
    raise UserError(f'data folder {root!r} {found}, wanted a folder with {wanted}; '
                    'set config.data.root')
  if not _is_utf8(path):
    raise UserError(f'data folder {path!r}: its name is not UTF-8; rename it')
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
  except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, depth of 1,000
    raise UserError(f'{path}: not readable JSON ({error}); is it the right file?') from None
  except OSError as error:
    raise unreadable(path, error) from None


def read_records(path: str, checks: Mapping[str, Check], key: str = '') -> list[tuple]:
  """The fields of each record of a JSON list (of the list under key, if given), as checked.

  Raises:
    UserError: as read_json and take_records.
  """
  return take_records(path, read_json(path), checks, key)


def take_records(path: str, content: Any, checks: Mapping[str, Check], key: str = ''
                 ) -> list[tuple]:
  """As read_records, of what read_json(path) has read.

  Args:
    path: of the file.
    content: what is in it.
    checks: field -> what it must be, see xmodal.data.fields.
    key: of the list in the content.

  Raises:
    UserError: no such list, nothing in it, or a record with a field that is wrong.
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
  """Raises UserError if two records of a file have one value in a field that others refer to."""
  first = {}
  for place, value in enumerate(values):
    if first.setdefault(value, place) != place:
      raise UserError(f'{path}: records {first[value]} and {place} (from 0) both have {field} '
                      f'{shown(value)}, wanted one of its own for each; which is meant elsewhere '
                      'cannot be known')


def check_present(missing: list[str], total: int, folder: str, pictures: Pictures) -> None:
  """Raises UserError if any of the pictures that a data set names is missing."""
  if missing:
    name = missing[0] if missing[0].isprintable() else shown(missing[0])
    raise UserError(f'{len(missing)} of {total} pictures are not in {folder}, such as {name}; '
                    f'unpack the pictures there{pictures.hint()}')


def unreadable(path: str, error: OSError) -> UserError:
  """What to raise where a file or folder is there and may not be read."""
  return UserError(f'{path}: cannot be read ({error.strerror}); let this user read it')


def _is_utf8(name):
  """Whether a file's name is text: bytes that are not UTF-8 come as halves of characters."""
  try:
    name.encode()
  except UnicodeEncodeError:
    return False
  return True


def _list_folder(folder):
  try:
    with os.scandir(folder) as entries:
      are_files = {entry.name: _is_file(entry) for entry in entries}
  except ValueError:  # a NUL in the name
    are_files = {}
  except OSError as error:
    if error.errno not in _NOTHING_THERE:
      raise unreadable(folder, error) from None
    are_files = {}
  files = frozenset(name for name, is_file in are_files.items() if is_file)
  return _Listing(files, frozenset(are_files) - files)


def _is_file(entry):
  try:
    return entry.is_file()
  except OSError:  # a link to itself, or into a folder that may not be read
    return False
