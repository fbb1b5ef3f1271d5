"""Visual Genome (Krishna et al., IJCV 2017): objects, and phrases for regions of a picture."""

import array
from collections.abc import Iterable, Iterator, Sequence
import functools
import hashlib
import itertools
import operator
import os

import numpy as np

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import Fault, fault, known_size, picture_size, usable_box, usable_name
from xmodal.data.fields import Complaint
from xmodal.data.overview import Gathering, Overview, gathered
from xmodal.data.sources.files import each_record, existing_folder, read_json, take_records
from xmodal.data.sources.find_pictures import Pictures, check_present
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_LARGE = 2**31  # pixels; a larger number may be no float
_SPLITS = ('train', 'val', 'test')
_VAL_SHARE = _TEST_SHARE = 0.05
_REGION_SIDES = ('x', 'y', 'width', 'height')
_FIELDS = {'objects': operator.itemgetter('object_id', 'names', *'xywh'),
           'regions': operator.itemgetter('region_id', 'phrase', *_REGION_SIDES)}
_FOLDERS = ('VG_100K', 'VG_100K_2')


@SOURCES.register('visual_genome', boxes=True)
def read_visual_genome(root: str, split: str) -> 'VisualGenome':
  """Reads objects.json and region_descriptions.json, or one of them, as distributed.

  image_data.json lists the pictures and their sizes; they are in VG_100K/ and
  VG_100K_2/. The data set has no official splits: by a hash of image_id, 5% of
  its pictures are val, 5% test and the rest train. Half of the pictures are
  COCO's, from both its train and val: a model evaluated on COCO may have seen
  its pictures here.

  Args:
    root: the folder of the files.
    split: 'train', 'val', 'test', or several joined by a plus.

  Returns:
    One Example per region description, whose phrase is the expression; one per
    picture if there is no region_descriptions.json. An object's name is the first
    of its names; without objects.json, objects is None in all Examples.

  Raises:
    UserError: a file or picture is missing or invalid, or no example is left.
  """
  if not set(split.split('+')) <= set(_SPLITS):
    raise UserError(f'Visual Genome has no split {split!r}, wanted some of {", ".join(_SPLITS)}, '
                    'joined by a plus')
  root = existing_folder(root, 'image_data.json, objects.json, region_descriptions.json')
  return VisualGenome(root, split)


class VisualGenome:
  """A split, as a sequence of Examples that are created on access.

  The first region of each picture comes first, then the second of each, so that
  the first few thousand examples are a sample of all pictures.

  Attributes:
    is_whole: see pipeline.sample.
    faults: everything that was left out or repaired, a line each.
  """

  is_whole = True

  def __init__(self, root: str, split: str):
    faults: list[Fault] = []
    self._images, self._image_ids, self._sizes = _read_pictures(root, split, faults)
    numbers = {str(image_id): n for n, image_id in enumerate(self._image_ids)}
    self._objects, self._regions = (
        _read_boxes(os.path.join(root, file), split, kind, numbers, self._sizes, faults)
        for file, kind in (('objects.json', 'objects'), ('region_descriptions.json', 'regions')))
    if self._objects is None and self._regions is None:
      raise UserError(f'{root} has neither objects.json nor region_descriptions.json, wanted one '
                      'or both as distributed')
    self.faults = tuple(faults)
    if self._regions is not None:
      self._order = self._regions.in_turn()
    if not len(self):
      raise UserError(f'{root}: region_descriptions.json has no region of {split!r} that can be '
                      'used')

  def __len__(self) -> int:
    return len(self._images) if self._regions is None else len(self._order)

  def __getitem__(self, index: int) -> Example:
    picture, expression = range(len(self))[index], None
    if self._regions is not None:
      row = self._order[index]
      picture, expression = self._regions.pictures[row], self._regions.row(row)
    return self._example(picture, expression)

  @functools.cached_property
  def overview(self) -> Overview:
    """See data.overview: as of all examples, without making each."""
    if self._regions is None:
      return gathered(self)
    gathering, unnamed = Gathering(), Object('', (0.0, 0.0, 0.0, 0.0))
    counts = np.bincount(self._regions.pictures, minlength=len(self._images))
    for picture, count in enumerate(counts.tolist()):
      if count:
        gathering.add(self._example(picture, unnamed), count)
    gathering.add_expressions(self._regions.texts(self._order))
    return gathering.overview()

  def __getstate__(self):
    return {key: value for key, value in vars(self).items() if key != 'overview'}

  def _example(self, picture, expression):
    return Example(
        image=self._images[picture], image_id=self._image_ids[picture], expression=expression,
        recorded_size=known_size(self._sizes[picture]),
        objects=None if self._objects is None else self._objects.of_picture(picture))


class _Names(list[str]):
  """Texts that many boxes share."""

  def __init__(self):
    super().__init__()
    self._numbers: dict[str, int] = {}

  def add(self, name: str) -> int:
    """Its place."""
    if (number := self._numbers.setdefault(name, len(self))) == len(self):
      self.append(name)
    return number

  def add_all(self, names: Sequence[str]) -> Sequence[int]:
    """Their places."""
    found = list(map(self._numbers.get, names))
    return list(map(self.add, names)) if None in found else found


class _Phrases:
  """Texts that hardly two boxes share, without an object for each."""

  def __init__(self):
    self._texts, self._ends = bytearray(), array.array('q', [0])

  def add(self, text: str) -> int:
    """Its place."""
    self._texts += text.encode()
    self._ends.append(len(self._texts))
    return len(self._ends) - 2

  def add_all(self, texts: Sequence[str]) -> Sequence[int]:
    """Their places."""
    encoded, first = list(map(str.encode, texts)), len(self._ends) - 1
    ends = itertools.accumulate(map(len, encoded), initial=len(self._texts))
    self._ends.extend(itertools.islice(ends, 1, None))
    self._texts += b''.join(encoded)
    return range(first, first + len(encoded))

  def __getitem__(self, place: int) -> str:
    return self._texts[self._ends[place]:self._ends[place + 1]].decode()


class _Boxes:
  """Names and boxes of many pictures in arrays: nine million Python objects would take gigabytes.

  Attributes:
    pictures: int32 [N], the picture number of each row, ascending after `pack`.
  """

  def __init__(self, names: '_Names | _Phrases'):
    self._names = names
    self.pictures, self._named, self._boxes = (array.array(kind) for kind in 'iif')

  def add(self, picture: int, name: str, box: tuple[float, float, float, float]) -> None:
    self.pictures.append(picture)
    self._named.append(self._names.add(name))
    self._boxes.extend(box)

  def add_all(self, picture: int, names: Sequence[str], boxes: Iterable[tuple]) -> None:
    """Adds all boxes of a picture."""
    self.pictures.extend(itertools.repeat(picture, len(names)))
    self._named.extend(self._names.add_all(names))
    self._boxes.extend(itertools.chain.from_iterable(boxes))

  def pack(self, num_pictures: int) -> None:
    """Sorts the rows by picture; call it once, after the last box."""
    order = np.argsort(np.asarray(self.pictures), kind='stable')
    self.pictures = np.asarray(self.pictures)[order]
    self._named = np.asarray(self._named)[order]
    self._boxes = np.asarray(self._boxes).reshape(-1, 4)[order]
    self._starts = np.searchsorted(self.pictures, np.arange(num_pictures + 1))

  def row(self, row: int) -> Object:
    return Object(self._names[self._named[row]], tuple(self._boxes[row].tolist()))

  def of_picture(self, picture: int) -> tuple[Object, ...]:
    rows = slice(self._starts[picture], self._starts[picture + 1])
    return tuple(Object(self._names[named], tuple(box)) for named, box in
                 zip(self._named[rows].tolist(), self._boxes[rows].tolist()))

  def texts(self, rows: np.ndarray) -> Iterator[str]:
    """Yields the text of each of some rows."""
    return map(self._names.__getitem__, self._named[rows].tolist())

  def in_turn(self) -> np.ndarray:
    """Row numbers in round-robin order: the first of each picture, then the second, and so on."""
    turn = np.arange(len(self.pictures)) - self._starts[self.pictures]
    return np.argsort(turn, kind='stable')


def _read_pictures(root, split, faults):
  """Paths, image_ids and sizes of the pictures of a split."""
  path = os.path.join(root, 'image_data.json')
  content = read_json(path)  # small
  ids = take_records(path, content, {'image_id': fields.identifier})
  files, found, missing = Pictures(root), {}, []
  for (image_id,), record in zip(ids, content):
    if _split_of(image_id) not in split.split('+'):
      continue
    if str(image_id) in found:
      faults.append(fault(f'{path}: image_id {image_id}', 'is listed twice, kept once'))
      continue
    name = f'{image_id}.jpg'
    paths = (files.find(os.path.join(folder, name)) for folder in _FOLDERS)
    image = next((path for path in paths if path), None)
    if image is None:
      missing.append(name)
    size = picture_size(record, f'{path}: image_id {image_id}', faults)
    found[str(image_id)] = image, image_id, size
  check_present(missing, len(found), f'{root} ({", ".join(_FOLDERS)})', files)
  if not found:
    raise UserError(f'{path}: none of {len(ids)} pictures is in {split!r}')
  return tuple(zip(*found.values()))


def _read_boxes(path, split, kind, numbers, sizes, faults):
  """The objects or regions of a split as _Boxes; None if there is no such file."""
  if not storage.is_file(path):
    return None
  boxes = _Boxes(_Names() if kind == 'objects' else _Phrases())
  met, wanted, of_pictures = set(), f'pictures with {kind}', True
  for record in each_record(path, wanted):
    if not isinstance(record, dict) or kind not in record:
      of_pictures = False  # raised below: broken JSON would be the reason
      continue
    image_id = record.get('image_id', record.get('id'))
    try:
      image_id = fields.identifier(image_id)
    except Complaint:
      image_id = fields.shown(image_id)  # matches no listed picture
    number = numbers.get(str(image_id))
    if number in met:
      faults.append(fault(path, 'image_id {} is listed twice, kept once', image_id))
    elif number is not None:
      met.add(number)
      if (plain := _plain(kind, record[kind], sizes[number])) is not None:
        boxes.add_all(number, *plain)
        continue
      for name, box in _usable(path, kind, record[kind], sizes[number], faults):
        boxes.add(number, name, box)
    elif _split_of(image_id) in split.split('+'):
      faults.append(fault(path, 'image_id {} is not in image_data.json, left out', image_id))
  if not of_pictures:
    raise UserError(f'{path}: wanted a list of {wanted}, as distributed')
  boxes.pack(len(sizes))
  return boxes


def _plain(kind, items, size):
  """Names and boxes of one picture, as from _usable; None if a line may have to be written.

  Nearly all pictures are plain, and a loop over millions of items in Python would take a minute.
  """
  try:
    ids, names, x, y, w, h = zip(*map(_FIELDS[kind], items))
    if kind == 'objects':
      if set(map(type, names)) != {list}:
        return None
      names = [of_object[0] for of_object in names]
  except (KeyError, TypeError, IndexError, ValueError):
    return None
  if set(map(type, names)) != {str} or set(map(type, ids + x + y + w + h)) != {int}:
    return None
  width, height = (min(side, _LARGE) for side in size)
  if (len(set(ids)) == len(ids)
      # Then no space is anywhere but between two words.
      and all(map(str.isprintable, names)) and '  ' not in ' '.join(['', *names, ''])
      and min(x) >= 0 and min(y) >= 0 and min(w) > 0 and min(h) > 0
      and max(w) < _LARGE and max(h) < _LARGE
      and max(map(operator.add, x, w)) <= width and max(map(operator.add, y, h)) <= height):
    return names, zip(x, y, w, h)
  return None


def _usable(path, kind, items, size, faults):
  """Yields (name, box) of the usable objects or regions of one picture."""
  seen = set()
  for item in items if isinstance(items, list) else [items]:
    if not isinstance(item, dict):
      faults.append(fault(f'{path}: one of {kind}', 'is {}, left out', item))
      continue
    if kind == 'objects':
      item_id, names, sides = item.get('object_id'), item.get('names'), 'xywh'
      name = names[0] if isinstance(names, list) and names else None
    else:
      item_id, name, sides = item.get('region_id'), item.get('phrase'), _REGION_SIDES
    key = item_id if type(item_id) is int else fields.shown(item_id)
    where = f'{path}: {kind[:-1]} {fields.shown(item_id)}'
    if item_id is not None:
      if key in seen:
        faults.append(fault(where, 'has the id of an earlier one, left out'))
        continue
      seen.add(key)
    if not (name := usable_name(name, where, faults)):
      continue
    box = [item.get(side) for side in sides]
    usable, what = usable_box(box, size)
    if what:
      faults.append(fault(where, what, box))
    if usable:
      yield name, usable


def _split_of(image_id):
  # A hash, so that the split depends on neither the order of the file nor a seed.
  digest = hashlib.sha256(str(image_id).encode()).digest()
  share = int.from_bytes(digest[:4], 'big') / 2**32
  return 'val' if share < _VAL_SHARE else 'test' if share < _VAL_SHARE + _TEST_SHARE else 'train'
