"""Boxes and outlines in the format of Ultralytics YOLO: data.yaml, and a text file a picture."""

import concurrent.futures
import os

import yaml

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import NO_AREA, SHARES, Examples, fault, usable_box
from xmodal.data.fields import Complaint, shown
from xmodal.data.pictures import images
from xmodal.data.sources.files import MissingSplit, existing_folder, split_names, unreadable
from xmodal.data.sources.find_pictures import Pictures, check_present, picture_files
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

# Rounding, as Ultralytics tolerates it.
_LOW, _HIGH = -0.01, 1.01

_ODD = 'line {} is neither "class x y width height" nor "class x1 y1 x2 y2 x3 y3 ...", left out'
_NO_NAME = 'class {} has no name in data.yaml, left out'
_NO_SHARES = 'coordinates {} are not shares of the picture (0..1), left out'
_TWICE = 'line {} is given twice, kept once'


@SOURCES.register('yolo', boxes=True)
def read_yolo(root: str, split: str) -> Examples:
  """Reads the pictures that data.yaml lists for a split, and the boxes beside them.

  data.yaml has names (a list, or number: name), train, val and test (a folder, a text file of
  paths, or a list of those) and optionally path, the folder that these begin in. The boxes of
  images/train/1.jpg are in labels/train/1.txt, a line each: class, and centre, width and height
  as shares of the picture. Of an outline (class x1 y1 x2 y2 ...) the box around it is taken, of
  a pose (kpt_shape in data.yaml) its box. A picture without a text file has no objects.

  The size of each picture, which turns shares into pixels, is read from its header here, in
  threads, and not when an example is read: boxes outside their pictures and names are then known
  before a run.

  Args:
    root: the folder of data.yaml.
    split: 'train', 'val' or 'test'.

  Returns:
    Examples in the order of data.yaml; faults are lines that were left out or repaired.

  Raises:
    UserError: data.yaml is missing or invalid, or a picture is missing.
  """
  root = existing_folder(root, 'data.yaml, images and labels')
  path, content = _read_yaml(root)
  names = _names(path, content)
  faults = []
  base = _base(root, content)
  pictures = _pictures(path, content, split, base)
  reader = _Reader(names, 'kpt_shape' in content)
  examples = []
  threads = storage.AT_ONCE if storage.is_remote(root) else None
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for image, (objects, wrong) in zip(pictures, pool.map(reader.read, pictures)):
      faults += wrong
      examples.append(Example(image=image, objects=objects,
                              image_id=os.path.relpath(image, base)))
  return Examples(examples, faults, {name: number for number, name in reversed(names.items())})


def _read_yaml(root):
  """The path and content of data.yaml, or of the only .yaml file."""
  path = os.path.join(root, 'data.yaml')
  if not storage.is_file(path):
    found = sorted(name for name in storage.list_dir(root) if name.endswith(('.yaml', '.yml')))
    if len(found) != 1:
      raise UserError(f'{root} has no data.yaml; .yaml files there: {", ".join(found) or "none"}')
    path = os.path.join(root, found[0])
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      content = yaml.safe_load(file)
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: broken YAML ({" ".join(str(error).split())})') from None
  except OSError as error:
    raise unreadable(path, error) from None
  if not isinstance(content, dict):
    raise UserError(f'{path}: is {shown(content)}, wanted names, train and val')
  return path, content


def _names(path, content):
  """class number -> name."""
  names = content.get('names')
  if names is None and isinstance(content.get('nc'), int):
    names = [f'class_{number}' for number in range(content['nc'])]
  if isinstance(names, list):
    names = dict(enumerate(names))
  if not isinstance(names, dict) or not names or not all(type(key) is int for key in names):
    raise UserError(f'{path}: names are {shown(names)}, wanted a list, or number: name')
  if (count := content.get('nc', len(names))) != len(names):
    raise UserError(f'{path}: nc is {shown(count)}, and there are {len(names)} names')
  try:
    return {number: fields.name(str(name) if isinstance(name, int | float) else name)
            for number, name in names.items()}
  except Complaint as complaint:
    raise UserError(f'{path}: a name {complaint}') from None


def _base(root, content):
  """The folder that paths in data.yaml begin in."""
  given = content.get('path')
  if isinstance(given, str) and storage.is_dir(folder := _place(root, given)):
    return folder
  return root  # path is often that of another machine, or of a common folder of data sets


def _place(base, entry):
  return storage.normal(entry if storage.is_remote(entry) else os.path.join(base, entry))


def _pictures(path, content, split, base):
  """The paths of a split's pictures."""
  key = next((name for name in split_names(split) if content.get(name)), None)
  if key is None:
    there = [name for name in ('train', 'val', 'test', 'validation') if content.get(name)]
    raise MissingSplit(f'{path}: has no {split!r}, wanted a folder or a list of pictures; there: '
                       f'{", ".join(there) or "none"}')
  entries = content[key] if isinstance(content[key], list) else [content[key]]
  found = []
  for entry in entries:
    if not isinstance(entry, str):
      raise UserError(f'{path}: {key} is {shown(content[key])}, wanted a folder, a text file of '
                      'paths, or a list of those')
    place = _place(base, entry)
    if not storage.exists(place) and entry.startswith('../'):  # Roboflow: one too many
      place = _place(base, entry[3:])
    if storage.is_dir(place):
      found += picture_files(place)
    elif storage.is_file(place):
      found += _listed(place, base)
    else:
      raise UserError(f'{path}: {key}: {place} does not exist, wanted a folder or a text file of '
                      'paths')
  if not found:
    raise UserError(f'{path}: {key}: no pictures in {", ".join(entries)}')
  return list(dict.fromkeys(found))


def _listed(path, base):
  """The pictures in a text file: from its own folder after './', otherwise from base."""
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      names = [line.strip() for line in file if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8, wanted paths of pictures') from None
  pictures, own = Pictures(base), Pictures(os.path.dirname(path))
  found, missing = [], []
  for name in names:
    first, second = (own, pictures) if name.startswith('./') else (pictures, own)
    name = name.removeprefix('./')
    image = first.find(name) or second.find(name)
    (found if image else missing).append(image or name)
  check_present(missing, len(names), base, pictures)
  return found


class _Reader:
  """Reads the text file of a picture."""

  def __init__(self, names, has_poses):
    self._names, self._has_poses = names, has_poses

  def read(self, image):
    """The objects of a picture, None if they are not known; and Faults."""
    path = label_path(image)
    try:
      with storage.open_file(path, encoding='utf-8-sig') as file:
        lines = file.read().splitlines()
    except FileNotFoundError:
      return (), []
    except UnicodeDecodeError:
      return None, [fault(path, 'is not UTF-8, its boxes left out')]
    except OSError as error:
      raise unreadable(path, error) from None
    size = images.stored_size(image)
    if size is None:  # training counts unreadable pictures
      return None, []
    objects, faults, met = [], [], set()
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      thing, what, value = self._object(line, size)
      if not what and tuple(line.split()) in met:
        thing, what, value = None, _TWICE, line
      met.add(tuple(line.split()))
      if what:
        faults.append(fault(f'{path}:{number}', what, value))
      if thing:
        objects.append(thing)
    return tuple(objects), faults

  def _object(self, line, size):
    """An Object or None, what is wrong ('' if nothing), and the value found."""
    try:
      category, *values = map(float, line.split())
    except ValueError:
      return None, _ODD, line
    if category not in self._names:
      return None, _NO_NAME, int(category) if category.is_integer() else category
    is_box = len(values) == 4 or (self._has_poses and len(values) > 4)
    if not is_box and (len(values) < 6 or len(values) % 2):
      return None, _ODD, line
    values = values[:4] if is_box else values
    if not all(_LOW <= value <= _HIGH for value in values):  # NaN is outside, too
      return None, _NO_SHARES, values
    if is_box:
      x, y, width, height = values
      left, top = x - width / 2, y - height / 2
    else:
      left, top = min(values[::2]), min(values[1::2])
      width, height = max(values[::2]) - left, max(values[1::2]) - top
    pixels = (left * size[0], top * size[1], width * size[0], height * size[1])
    box, what = usable_box(pixels, size)
    what = NO_AREA if what == SHARES else what  # smaller than a pixel
    number = int(category)
    return box and Object(self._names[number], box, category_id=number), what, [
        round(side, 2) for side in pixels]


def label_path(image: str) -> str:
  """The text file of a picture: in labels/ in place of the last images/ of its path."""
  before, images_, after = image.rpartition(f'{os.sep}images{os.sep}')
  if images_:
    image = f'{before}{os.sep}labels{os.sep}{after}'
  return f'{os.path.splitext(image)[0]}.txt'
