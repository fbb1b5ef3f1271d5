"""Finds the picture files that a data set names, whichever operating system wrote the names."""

from collections.abc import Iterable, Sequence
import dataclasses
import errno
import functools
import os
import unicodedata

from PIL import Image

from xmodal import storage
from xmodal.data.fields import shown
from xmodal.data.sources.files import is_utf8, unreadable
from xmodal.errors import UserError

# Errors that mean a path does not exist; others mean that it cannot be accessed.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class Pictures:
  """Looks up files below a folder, of this machine or a bucket; lists each folder once.

  A name that does not exist as written also matches with its backslashes as slashes,
  and with accents in either Unicode normal form: composed characters (NFC, as on
  Windows) or letters followed by combining marks (NFD, as on macOS).
  """

  def __init__(self, root: str):
    self.root = root
    self._listings: dict[str, _Listing] = {}

  def find(self, name: str) -> str | None:
    """The absolute path of a file named relative to the root, or the address of one in a bucket;
    None if it does not exist.

    Raises:
      UserError: the file's folder cannot be listed.
    """
    path = os.path.join(self.root, name)
    if '://' in path and storage.is_remote(address := name if storage.is_remote(name) else path):
      path = storage.normal(address)
    folder, base = os.path.split(path)
    if base in self._listing(folder).files:
      return path
    if name.isascii() and '\\' not in name:
      return None
    folder, base = self._split(name)
    found = self._listing(folder).alike.get(_composed(base))
    return found and os.path.join(folder, found)

  def find_ending(self, name: str, first: Sequence[str]) -> str | None:
    """As find, for a picture named without its file extension.

    Args:
      name: the name without the extension.
      first: extensions to try first, in this order; then any that Pillow knows.
    """
    exact = next((path for end in first if (path := self.find(name + end))), None)
    if exact:
      return exact
    folder, base = self._split(name)
    found = self._listing(folder).pictures.get(_composed(base))
    return found and os.path.join(folder, found)

  def hint(self) -> str:
    """A possible reason why a picture is not found; '' if none is known."""
    names = (name for listing in self._listings.values()
             for name in sorted(listing.files | listing.others))
    odd = next((name for name in names if not is_utf8(name)), '')
    return odd and f'; names there are not UTF-8, such as {odd!r}: rename those files'

  def _split(self, name):
    """The folder of a name, spelled as on disk, and the base name."""
    *folders, base = name.replace('\\', '/').split('/')
    path = os.sep if folders and not folders[0] else self.root
    if storage.is_remote(name):
      path, folders = '/'.join(folders[:3]), folders[3:]
    for folder in filter(None, folders):
      there = os.path.join(path, folder)
      if not self._is_dir(there):
        there = os.path.join(path, self._listing(path).folders.get(_composed(folder), folder))
      path = there
    return path, base

  def _is_dir(self, folder):
    if storage.is_remote(folder):
      return self._listing(folder).is_filled
    return os.path.isdir(folder)

  def _listing(self, folder):
    if folder not in self._listings:
      self._listings[folder] = _list_folder(folder)
    return self._listings[folder]


def find_pictures(folder: str, flag: str) -> list[str]:
  """The paths of all files in a folder, and in those below, that are named as pictures, sorted.

  Args:
    folder: its path.
    flag: of a command that names it, for messages ('--images').

  Raises:
    UserError: no such folder, or no pictures in it.
  """
  if not storage.is_dir(folder):
    raise UserError(f'{flag} {folder}: no such folder')
  paths = picture_files(folder)
  if not paths:
    raise UserError(f'{flag} {folder}: no pictures in that folder; wanted some in a format that '
                    'Pillow opens, such as .jpg or .png')
  return paths


def picture_files(folder: str) -> list[str]:
  """As find_pictures; [] if there is no such folder or nothing in it."""
  if storage.is_remote(folder):
    return [os.path.join(folder, name) for name in storage.walk(folder) if is_picture(name)]
  return sorted(os.path.join(place, name)
                for place, _, names in os.walk(folder, followlinks=True) for name in names
                if is_picture(name))


def is_picture(name: str) -> bool:
  """Whether a file is named as a picture that Pillow may open."""
  return os.path.splitext(name)[1].lower() in Image.registered_extensions()


def find_all(root: str, names: Iterable[str], folders: Sequence[str] = ('',)) -> dict[str, str]:
  """name -> path of each picture that a data set names.

  Args:
    root: the data set's folder.
    names: of the pictures; a name may occur several times.
    folders: folders below root, searched in this order.

  Raises:
    UserError: pictures are missing.
  """
  pictures, found = Pictures(root), {}
  for name in names:
    if name not in found:
      paths = (pictures.find(os.path.join(folder, name)) for folder in folders)
      found[name] = next(filter(None, paths), None)
  missing = [name for name, path in found.items() if path is None]
  listed = ', '.join(filter(None, folders))
  check_present(missing, len(found), f'{root} ({listed})' if listed else root, pictures)
  return found


def check_present(missing: list[str], total: int, folder: str, pictures: Pictures) -> None:
  """Raises UserError if any of the pictures that a data set names is missing."""
  if missing:
    name = missing[0] if missing[0].isprintable() else shown(missing[0])
    raise UserError(f'{len(missing)} of {total} pictures are not in {folder}, such as {name}; '
                    f'unpack the pictures there{pictures.hint()}')


@dataclasses.dataclass(frozen=True)
class _Listing:
  """The names in a folder."""

  files: frozenset[str]
  others: frozenset[str]

  @property
  def is_filled(self):
    return bool(self.files or self.others)

  @functools.cached_property
  def alike(self):
    """Files by their normalised names."""
    return {_composed(name): name for name in sorted(self.files)}

  @functools.cached_property
  def folders(self):
    return {_composed(name): name for name in sorted(self.others)}

  @functools.cached_property
  def pictures(self):
    """Files that Pillow may open, by their normalised names without extension."""
    endings = Image.registered_extensions()
    parts = {name: os.path.splitext(name) for name in sorted(self.files, reverse=True)}
    return {_composed(stem): name for name, (stem, end) in parts.items() if end.lower() in endings}


def _composed(name):
  return unicodedata.normalize('NFC', name)


def _list_folder(folder):
  try:
    if storage.is_remote(folder):
      are_files = storage.scan(storage.normal(folder))
      files = frozenset(name for name, is_file in are_files.items() if is_file)
      return _Listing(files, frozenset(are_files) - files)
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
  except OSError:  # a link to itself, or into a folder without permission
    return False
