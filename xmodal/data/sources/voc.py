"""Pascal VOC (Everingham et al., IJCV 2010), and other data labelled in its format."""

import os
import re
import xml.etree.ElementTree as ET

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import (
  Examples,
  Fault,
  fault,
  known_size,
  picture_size,
  usable_box,
  usable_name,
)
from xmodal.data.fields import Complaint
from xmodal.data.sources.files import MissingSplit, existing_folder, unreadable
from xmodal.data.sources.find_pictures import Pictures, check_present
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_FOLDERS = 'Annotations, ImageSets/Main and JPEGImages'
_OFFICIAL = re.compile(r'The VOC20\d\d Database')
_ENDINGS = ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG', '.bmp')
# Lists for one class have a flag after each name: whether the class is in the picture.
_CLASS_FLAG = re.compile(r'(.*\S)\s+(?:-1|0|1)')
_SIDES = ('xmin', 'ymin', 'xmax', 'ymax')


@SOURCES.register('voc', boxes=True)
def read_voc(root: str, split: str) -> Examples:
  """Reads boxes and names of the pictures listed in ImageSets/Main/{split}.txt.

  The meaning of xmin to ymax depends on the writer. In the official sets, whose
  files say `<database>The VOC2007 Database</database>` or another year, they are
  the numbers of the first and last pixel inside, counted from 1: the box begins
  at xmin - 1 and is xmax - xmin + 1 wide, as in detectron2. In any other file they
  are edges, used unchanged; this is how labelImg writes them (database 'Unknown').
  labelImg also writes an edge at 0 as 1, which cannot be told from a true 1 and is
  kept.

  Args:
    root: the folder that holds Annotations, ImageSets and JPEGImages, or one above
      it (VOCdevkit, or its parent).
    split: name of a list, 'train', 'val', 'trainval' or 'test'; several are
      joined by a plus, 'train+val'. A line is the name of a picture without its
      file extension, which may be any that Pillow knows.

  Returns:
    Examples in the order of the lists; image_id is the name in the list, an object's
    ignore is VOC's difficult. Faults are bad boxes, in the file's form (xmin, ymin,
    xmax, ymax), and pictures whose annotations are missing or broken.

  Raises:
    UserError: there is no such folder, list or picture.
  """
  root = _devkit(existing_folder(root, _FOLDERS))
  faults, examples = [], []
  pictures = Pictures(os.path.join(root, 'JPEGImages'))
  names = {}
  for part in split.split('+'):
    path, lines = _listed(root, part)
    for line in lines:
      name, image = _find(pictures, line)
      if name in names:
        faults.append(fault(f'{path}: {name}', 'is listed twice, kept once'))
      names[name] = image
  missing = [f'{name}.jpg' for name, image in names.items() if image is None]
  annotations = Pictures(os.path.join(root, 'Annotations'))
  found = {name: image for name, image in names.items() if image is not None}
  paths = (annotations.find(f'{name}.xml') or os.path.join(annotations.root, f'{name}.xml')
           for name in found)
  for (name, image), (objects, size, wrong) in zip(
      found.items(), storage.each(root, _read_objects, paths)):
    faults += wrong
    if objects is not None:
      examples.append(Example(image=image, image_id=name, objects=objects, recorded_size=size))
  check_present(missing, len(names), pictures.root, pictures)
  if not examples:
    raise UserError(f'{faults[0]}; none of the {len(names)} pictures in {split!r} can be used')
  return Examples(examples, faults)


def _devkit(root):
  """The one folder at or below root that holds Annotations."""
  if storage.is_dir(os.path.join(root, 'Annotations')):
    return root
  found = [os.path.join(folder, name)
           for folder in (root, os.path.join(root, 'VOCdevkit')) if storage.is_dir(folder)
           for name in sorted(storage.list_dir(folder))
           if storage.is_dir(os.path.join(folder, name, 'Annotations'))]
  if len(found) != 1:
    raise UserError(f'{root} holds {" and ".join(found) or f"no {_FOLDERS}"}, wanted one folder '
                    f'with {_FOLDERS}; set config.data.root to it')
  return found[0]


def _listed(root, split):
  """The path of a list, and its lines."""
  folder = os.path.join(root, 'ImageSets', 'Main')
  path = os.path.join(folder, f'{split}.txt')
  if not storage.is_file(path):
    found = ', '.join(sorted(storage.list_dir(folder))) if storage.is_dir(folder) else 'none'
    raise MissingSplit(f'{path}: no such file; lists in that folder: {found}')
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      lines = [fields.filled_text(line) for line in file if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8, wanted names of pictures in UTF-8; '
                    'is it the right file?') from None
  except Complaint as complaint:
    raise UserError(f'{path}: a name {complaint}; is it the right file?') from None
  except OSError as error:
    raise unreadable(path, error) from None
  if not lines:
    raise UserError(f'{path}: lists no pictures, wanted a name a line')
  return path, lines


def _find(pictures, line):
  """The name in a line of a list, and the path of its picture (None if there is none)."""
  image = pictures.find_ending(line, _ENDINGS)
  flagged = None if image else _CLASS_FLAG.fullmatch(line)
  if not flagged:
    return line, image
  return flagged[1], pictures.find_ending(flagged[1], _ENDINGS)


def _read_objects(path):
  """The objects of one picture, None if its file cannot be used; its recorded size; and Faults."""
  faults = []
  try:
    with storage.open_file(path, 'rb') as file:
      tree = ET.parse(file).getroot()
    if tree.tag != 'annotation':
      raise ValueError(f'<{tree.tag}>, wanted <annotation>')
  except FileNotFoundError:
    return None, None, [fault(path, 'no such file, its picture left out')]
  except UserError:
    raise
  except OSError as error:
    raise unreadable(path, error) from None
  except (ET.ParseError, ValueError, LookupError) as error:  # the last two: strange encodings
    return None, None, [Fault(f'{path}: broken XML ({error}), its picture left out',
                              'broken XML, its picture left out')]
  size = picture_size({side: _size(tree.findtext(f'size/{side}')) for side in ('width', 'height')},
                      path, faults)
  official = bool(_OFFICIAL.search(tree.findtext('source/database') or ''))
  objects = []
  for number, element in enumerate(tree.findall('object'), 1):
    where = f'{path}: object {number}'
    if not (name := usable_name(element.findtext('name'), where, faults)):
      continue
    difficult = (element.findtext('difficult') or '').strip() or '0'
    if difficult not in ('0', '1'):
      faults.append(fault(where, 'difficult is {}, wanted 0 or 1, taken as 0', difficult))
    # Only direct children: boxes of body parts are nested deeper.
    found = [element.findtext(f'bndbox/{side}') for side in _SIDES]
    edges = [_number(text) for text in found]
    box, what = usable_box(_box(edges, official), size)
    if what:
      faults.append(fault(where, what, found if None in edges else edges))
    if box:
      objects.append(Object(name, box, difficult == '1'))
  return tuple(objects), known_size(size), faults


def _box(edges, official):
  """(xmin, ymin, xmax, ymax) as (x, y, width, height); None if any is not a number."""
  if None in edges:
    return None
  x0, y0, x1, y1 = edges
  if official:
    x0, y0 = x0 - 1, y0 - 1
  return x0, y0, x1 - x0, y1 - y0


def _size(text):
  """The number in a text; None if there is no text; the text itself if it is not a number."""
  number = _number(text)
  return (text or '').strip() or None if number is None else number


def _number(text):
  for kind in (int, float):
    try:
      return kind(text)
    except (TypeError, ValueError):
      pass
  return None
