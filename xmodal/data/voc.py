"""Pascal VOC (Everingham et al., IJCV 2010), and what people label in its format."""

import os
import re
import sys
import xml.etree.ElementTree as ET

from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, Fault, fault, picture_size, usable_box
from xmodal.data.files import (
    MissingSplit, Pictures, check_present, existing_folder, unreadable)
from xmodal.errors import UserError

_WANTED = 'Annotations, ImageSets/Main and JPEGImages'
_OFFICIAL = re.compile(r'The VOC20\d\d Database')
_ENDINGS = ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG', '.bmp')
_SIDES = ('xmin', 'ymin', 'xmax', 'ymax')


def read_voc(root: str, split: str) -> Examples:
  """Reads boxes and names of the pictures listed in ImageSets/Main/{split}.txt.

  What xmin to ymax mean depends on who wrote them. In the official sets, whose
  files say `<database>The VOC2007 Database</database>` or another year, they are
  the numbers of the first and last pixel inside, counted from 1: the box begins
  at xmin - 1 and is xmax - xmin + 1 wide, as detectron2 reads them. Any other file
  has edges, taken as they are: so labelImg writes them (database 'Unknown'). It
  writes an edge at 0 as 1, which is not undone: nobody can tell the two apart.

  Args:
    root: the folder that holds Annotations, ImageSets and JPEGImages, or one above
      it (VOCdevkit, or what holds that).
    split: name of a list, 'train', 'val', 'trainval' or 'test'; several are
      joined by a plus, 'train+val'.

  Returns:
    Examples in the order of the lists; image_id is the name listed, an object's
    ignore is VOC's difficult. Faults are boxes, shown as the file has them (xmin,
    ymin, xmax, ymax), and pictures whose annotations are missing or broken.

  Raises:
    UserError: there is no such folder, list or picture.
  """
  root = _devkit(existing_folder(root, _WANTED))
  faults, missing, examples = [], [], []
  pictures = Pictures(os.path.join(root, 'JPEGImages'))
  names = {}
  for part in split.split('+'):
    for path, name in _listed(root, part):
      if name in names:
        faults.append(fault(f'{path}: {name}', 'is listed twice, kept once'))
      names[name] = None
  for name in names:
    image = next((path for path in (pictures.find(name + end) for end in _ENDINGS) if path), None)
    if image is None:
      missing.append(f'{name}.jpg')
      continue
    objects = _read_objects(os.path.join(root, 'Annotations', f'{name}.xml'), faults)
    if objects is not None:
      examples.append(Example(image=image, image_id=name, objects=objects))
  check_present(missing, len(names), pictures.root)
  if not examples:
    raise UserError(f'{faults[0]}; nor can any other of the {len(names)} in {split!r} be used')
  return Examples(examples, faults)


def _devkit(root):
  """The one folder at or below root that holds Annotations."""
  if os.path.isdir(os.path.join(root, 'Annotations')):
    return root
  found = [os.path.join(folder, name)
           for folder in (root, os.path.join(root, 'VOCdevkit')) if os.path.isdir(folder)
           for name in sorted(os.listdir(folder))
           if os.path.isdir(os.path.join(folder, name, 'Annotations'))]
  if len(found) != 1:
    raise UserError(f'{root} holds {" and ".join(found) or f"no {_WANTED}"}, wanted one folder '
                    f'with {_WANTED}; set config.data.root to it')
  return found[0]


def _listed(root, split):
  """[(path of the list, name of a picture)]."""
  folder = os.path.join(root, 'ImageSets', 'Main')
  path = os.path.join(folder, f'{split}.txt')
  if not os.path.isfile(path):
    found = ', '.join(sorted(os.listdir(folder))) if os.path.isdir(folder) else 'none'
    raise MissingSplit(f'{path}: no such file; lists in that folder: {found}')
  try:
    with open(path, encoding='utf-8-sig') as file:
      names = [line.split()[0] for line in file if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: byte {error.start} is not UTF-8; is it the right file?') from None
  except OSError as error:
    raise unreadable(path, error) from None
  if not names:
    raise UserError(f'{path}: lists no pictures, wanted a name a line')
  return [(path, name) for name in names]


def _read_objects(path, faults):
  """The objects of one picture; None where its file cannot be used."""
  try:
    tree = ET.parse(path).getroot()
    if tree.tag != 'annotation':
      raise ValueError(f'<{tree.tag}>, wanted <annotation>')
  except FileNotFoundError:
    faults.append(fault(path, 'no such file, its picture left out'))
    return None
  except OSError as error:
    raise unreadable(path, error) from None
  except (ET.ParseError, ValueError, LookupError) as error:  # the last two: strange encodings
    faults.append(Fault(f'{path}: broken XML ({error}), its picture left out',
                        'broken XML, its picture left out'))
    return None
  size = picture_size(_number(tree.findtext('size/width')), _number(tree.findtext('size/height')))
  official = bool(_OFFICIAL.search(tree.findtext('source/database') or ''))
  objects = []
  for number, element in enumerate(tree.findall('object'), 1):
    where = f'{path}: object {number}'
    name = (element.findtext('name') or '').strip()
    if not name:
      faults.append(fault(where, 'has no name, left out'))
      continue
    # Parts of a person have boxes of their own, deeper down.
    found = [element.findtext(f'bndbox/{side}') for side in _SIDES]
    edges = [_number(text) for text in found]
    box, what = usable_box(_box(edges, official), size)
    if what:
      faults.append(fault(where, what, found if None in edges else edges))
    if box:
      ignore = (element.findtext('difficult') or '').strip() == '1'
      objects.append(Object(sys.intern(name), box, ignore))
  return tuple(objects)


def _box(edges, official):
  """(xmin, ymin, xmax, ymax) as (x, y, width, height); None if one of them is no number."""
  if None in edges:
    return None
  x0, y0, x1, y1 = edges
  if official:
    x0, y0 = x0 - 1, y0 - 1
  return x0, y0, x1 - x0, y1 - y0


def _number(text):
  for kind in (int, float):
    try:
      return kind(text)
    except (TypeError, ValueError):
      pass
  return None
