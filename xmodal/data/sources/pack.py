"""Packs, as `xmodal pack` writes them: any size in constant memory, read at random."""

from collections.abc import Sequence
import functools
import io
import json
import os

import numpy as np

from xmodal import atomic, paths, storage
from xmodal.data.example import Example
from xmodal.data.overview import Overview
from xmodal.data.pack import examples, pack, records
from xmodal.data.sources.files import MissingSplit, existing_folder
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_AHEAD = 2**22  # bytes
_FILES = f'{pack.TITLE} and the files of a pack'


class PackedExamples(Sequence[Example]):
  """The examples of a split of a pack; each is read on access.

  Attributes:
    is_whole: see pipeline.sample.
    categories: as of faults.Examples.
    num_made: how many of them a model made.
    fingerprint: tells these examples from any others, see pack.fingerprint.
  """

  is_whole = True

  def __init__(self, readers: dict[str, records.RecordReader], categories: dict, num_made: int,
               fingerprint: str, overview: str):
    """overview: path of the file."""
    self._readers, self.categories, self._path = readers, categories, overview
    self.num_made, self.fingerprint = num_made, fingerprint

  def __len__(self):
    return len(self._readers['examples'])

  @functools.cached_property
  def overview(self) -> Overview | None:
    """See data.overview; None if it is not in the pack, as in one of an earlier version."""
    return Overview.load(self._path, self.fingerprint)

  def __getstate__(self):
    return {key: value for key, value in vars(self).items() if key != 'overview'}

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    number = range(len(self))[index]
    return examples.from_record(self._readers['examples'].read(number),
                                self._readers['pictures'].read)


def splits_of_pack(root: str) -> list[str]:
  """Names of the splits of a pack."""
  return list(_described(existing_folder(root, _FILES))['splits'])


@SOURCES.register('pack', splits=splits_of_pack)
def read_pack(root: str, split: str) -> PackedExamples:
  """Opens one split of a pack.

  Raises:
    UserError: no pack, of a newer version, without the split, or with files that are missing, cut,
      or of another pack.
  """
  root = existing_folder(root, _FILES)
  described = _described(root)
  if split not in (splits := described['splits']):
    raise MissingSplit(f'{root}: has no split {split!r}; it has {", ".join(splits)}')
  section, readers = splits[split], {}
  for kind, sizes in section['files'].items():
    files = [os.path.join(root, pack.file_name(split, kind, i)) for i in range(len(sizes))]
    records.check_files(files, sizes, (
        pack.title(described['pack'], split, kind, i) for i in range(len(sizes))))
    index = os.path.join(root, f'{split}-{kind}.npy')
    readers[kind] = records.RecordReader(
        files, _places(index, section[kind], sizes, described['pack']),
        # Vocabularies are learned from all examples in their order, and from no pictures.
        ahead=_AHEAD if kind == 'examples' else 0)
  return PackedExamples(readers, section['categories'], section['made'],
                        pack.fingerprint(described['pack'], split),
                        os.path.join(root, pack.overview_name(split)))


def _described(root):
  """The content of pack.json."""
  path = os.path.join(root, pack.TITLE)
  try:
    with storage.open_file(path) as f:
      described = json.load(f)
    version, _ = described['version'], described['splits']
  except FileNotFoundError:
    raise UserError(f'{root}: has no {pack.TITLE}: no pack, or one that is not finished; run '
                    '`xmodal pack` again') from None
  except UserError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: cannot be read ({error}); copy it again') from error
  if version != pack.VERSION:
    raise UserError(f'{path}: is of version {version}, this program reads {pack.VERSION}; update '
                    'it, or make the pack again')
  return described


def _places(path, count, sizes, name):
  """The index in a file; one of a bucket is kept in the user's cache."""
  kept = _kept(path, name)
  try:
    if storage.is_remote(path) and not os.path.isfile(kept):
      places = np.load(io.BytesIO(storage.read(path)))
    else:
      path = kept or path  # for messages, too
      places = np.load(path, mmap_mode='r')
  except UserError:
    raise
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read ({error}); copy it again') from error
  if places.dtype != records.PLACE or len(places) != count or not _ends(places, sizes):
    raise UserError(f'{path}: is the index of another pack; copy it again')
  if not kept or os.path.isfile(kept):
    return places
  part = f'{kept}.{os.getpid()}'  # other processes may start at the same time
  try:
    with atomic.written(part, 'wb') as f:
      np.save(f, places)
    os.replace(part, kept)
  except OSError:  # a full disk
    return places
  return np.load(kept, mmap_mode='r')


def _ends(places, sizes):
  """Whether the last record of an index is where its file ends."""
  if not len(places):
    return True
  file, offset, size = places[-1].item()
  return file < len(sizes) and offset + size + records.AFTER == sizes[file]


def _kept(path, name):
  """The path in the user's cache for the index of a pack in a bucket; '' without a cache."""
  cache = paths.cache('packs') if storage.is_remote(path) else None
  return cache and os.path.join(cache, f'{name}-{os.path.basename(path)}') or ''
