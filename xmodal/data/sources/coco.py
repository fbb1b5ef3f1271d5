"""COCO's instances (Lin et al., ECCV 2014), and other data exported in its format."""

import collections
from collections.abc import Hashable, Mapping
import os
from typing import Any, NamedTuple

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, Fault, fault, known_size, picture_size, usable_box
from xmodal.data.fields import Complaint, check_fields, shown
from xmodal.data.sources.files import MissingSplit, existing_folder, read_json, take_records
from xmodal.data.sources.find_pictures import Pictures, check_present
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

# Split -> its other names in the files.
_OTHER_NAMES = {'train': ('train2017', 'train2014'), 'val': ('val2017', 'val2014', 'valid'),
           'test': ('test-dev2017', 'test2017', 'test2014'), 'test-dev': ('test-dev2017',)}
_FILES = ('annotations/instances_{}.json', 'annotations/image_info_{}.json',
          'annotations/{}.json', '{}.json', '{}/_annotations.coco.json')
_FOLDERS = ('{}', 'images/{}', 'images', '')

_UNLISTED = 'image_id {} is not listed, left out'
_TWICE = 'has the id of an earlier one, left out'


@SOURCES.register('coco', boxes=True)
def read_coco(root: str, split: str) -> Examples:
  """Reads boxes, names and, if present, captions of COCO or data in its format.

  The annotations are the first existing file of this list, for the split's own
  name first, then for COCO's (train2017 or train2014 for train, test-dev2017 for
  test) and Roboflow's (valid for val):
  annotations/instances_{split}.json, annotations/image_info_{split}.json (no
  boxes), annotations/{split}.json, {split}.json, {split}/_annotations.coco.json.
  Captions are in annotations/captions_{split}.json. A picture's file_name is
  searched in {split}/ (by either name), images/{split}/, images/ and the
  folder itself.

  Args:
    root: the folder.
    split: such as 'train', 'val', 'test', or a name in the files, such as 'val2014'.

  Returns:
    Examples in the order of the file's images; faults in the order of its
    annotations. An object's ignore is iscrowd; its area is the outline's, even
    where the box was clipped; boxes are as in the file. If the file has no list of
    annotations, objects is None. Categories of the same name are merged.

  Raises:
    UserError: a file or picture is missing or invalid, two pictures or two
      categories share an id, or the captions belong to other pictures.
  """
  root = existing_folder(root, 'annotations/instances_train2017.json and pictures')
  name, path = _find(root, split)
  faults = []
  pictures, names, found = read_instances(path, faults)
  captions = _read_captions(root, name, pictures, faults)
  files, missing, examples = Pictures(root), [], []
  folders = list(dict.fromkeys(folder.format(called) for folder in _FOLDERS
                               for called in (name.replace('-dev', ''), split)))
  for image_id, (file_name, size) in pictures.items():
    paths = (files.find(os.path.join(folder, file_name)) for folder in folders)
    image = next((path for path in paths if path), None)
    if image is None:
      missing.append(file_name)
      continue
    objects = None if found is None else tuple(found.get(image_id, {}).values())
    examples.append(Example(image=image, image_id=image_id, objects=objects,
                            captions=tuple(captions.get(image_id, ())),
                            recorded_size=known_size(size)))
  check_present(missing, len(pictures), f'{root} ({", ".join(folders[:-1])})', files)
  # If ids share a name, the first one; Objects have their own category_id.
  return Examples(examples, faults, {name: number for number, name in reversed(names.items())})


class Instances(NamedTuple):
  """The content of a file of instances.

  Attributes:
    pictures: image_id -> (file_name, (width, height)); the size is infinite if not known.
    names: category_id -> name, for categories that have a name.
    objects: image_id -> {annotation_id: Object}; None if the file has no annotations.
  """

  pictures: dict[int | str, tuple[str, tuple[float, float]]]
  names: dict[int | str, str]
  objects: Mapping[int | str, dict[Hashable, Object]] | None


def read_instances(path: str, faults: list[Fault]) -> Instances:
  """Reads a file of instances; adds to faults what it leaves out. Raises: as read_coco."""
  content = read_json(path, _without_outlines)
  pictures = _read_pictures(path, content, faults)
  names = _read_categories(path, content, faults)
  return Instances(pictures, names, _read_objects(path, content, pictures, names, faults))


def _find(root, split):
  """A split's name in the files, and the path of its annotations."""
  names = (split, *_OTHER_NAMES.get(split, ()))
  for name in names:
    for file in _FILES:
      path = os.path.join(root, file.format(name))
      if storage.is_file(path):
        return name, path
  wanted = ', '.join(file.format(split) for file in _FILES)
  raise MissingSplit(f'{root} has no annotations of {split!r}, wanted one of {wanted}, or of '
                     f'{", ".join(names[1:]) or "another split"}')


def _without_outlines(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Drops the outlines from a JSON object: unused, and nine tenths of the file."""
  record = dict(pairs)
  record.pop('segmentation', None)
  return record


def _read_pictures(path, content, faults):
  """image_id -> (file_name, (width, height))."""
  pictures = {}
  records = take_records(path, content, _PICTURE, 'images')
  for (image_id, file_name), record in zip(records, content['images']):
    where = f'{path}: image {shown(image_id)}'
    if image_id not in pictures:
      pictures[image_id] = file_name, picture_size(record, where, faults)
    elif pictures[image_id][0] == file_name:
      faults.append(fault(where, 'is listed twice, kept once'))
    else:
      raise UserError(f'{path}: image id {shown(image_id)} is that of {pictures[image_id][0]} and '
                      f'of {file_name}, wanted a unique one for each: annotations refer to '
                      'pictures by id')
  return pictures


def _read_categories(path, content, faults):
  """category_id -> name, for categories that have a name."""
  records = content.get('categories')
  names = {}
  for place, record in enumerate(records if isinstance(records, list) else ()):
    values, complaints = check_fields(record if isinstance(record, dict) else {}, _CATEGORY)
    if complaints:  # its annotations are left out and reported
      faults.append(Fault(f'{path}: categories[{place}]: {complaints[0]}, left out',
                          'category without an id or a name, left out'))
      continue
    category_id, name = values['id'], values['name']
    if names.setdefault(category_id, name) != name:
      raise UserError(f'{path}: category id {shown(category_id)} is that of '
                      f'{names[category_id]!r} and of {name!r}, wanted a unique one for each')
  return names


def _read_objects(path, content, pictures, names, faults):
  """image_id -> {annotation_id: Object}; None if the file has no annotations."""
  annotations = content.get('annotations')
  if annotations is None:
    return None
  if not isinstance(annotations, list):
    raise UserError(f'{path}: annotations are {shown(annotations)}, wanted a list')
  found, seen, numbers = collections.defaultdict(dict), set(), collections.defaultdict(dict)
  for place, record in enumerate(annotations):
    image_id, thing, wrong = _read_object(record, pictures, names, seen)
    for what, value in wrong:
      annotation_id = record.get('id') if isinstance(record, dict) else None
      where = f'[{place}]' if annotation_id is None else f' {shown(annotation_id)}'
      faults.append(fault(f'{path}: annotation{where}', what, value))
    if thing:
      annotation_id = _key(record.get('id'))
      found[image_id][(place,) if annotation_id is None else annotation_id] = thing
      numbers[thing.name][thing.category_id] = None
  for name, ids in numbers.items():
    if len(ids) > 1:
      faults.append(fault(f'{path}: categories {", ".join(map(shown, ids))}',
                          'have one name, {}, and are taken as one', name))
  return found


def _read_object(record, pictures, names, seen):
  """One annotation -> image_id, Object or None, and [what is wrong, the value found]."""
  if not isinstance(record, dict):
    return None, None, [('is {}, left out', record)]
  annotation_id, image_id, category_id = (
      _key(record.get(key)) for key in ('id', 'image_id', 'category_id'))
  if image_id not in pictures:
    return None, None, [(_UNLISTED, record.get('image_id'))]
  if category_id not in names:
    return None, None, [('category_id {} has no name, left out', record.get('category_id'))]
  if annotation_id in seen:
    return None, None, [(_TWICE, '')]
  if annotation_id is not None:
    seen.add(annotation_id)
  box, crowd, area = map(record.get, ('bbox', 'iscrowd', 'area'))
  usable, what = usable_box(box, pictures[image_id][1])
  wrong = [(what, box)] if what else []
  try:
    crowd = crowd is not None and fields.flag(crowd)
  except Complaint:
    return None, None, [('iscrowd {} is not 0 or 1, left out', crowd)]
  if usable is None:
    return None, None, wrong
  try:
    pixels = None if area is None else fields.number(area)
  except Complaint:
    pixels = -1
  if pixels is not None and pixels < 0:
    wrong.append(('area {} is not a number of pixels, that of its box is taken', area))
    pixels = None
  return image_id, Object(names[category_id], usable, crowd, pixels, category_id), wrong


def _read_captions(root, name, pictures, faults):
  """image_id -> list of captions; empty if there is no captions file."""
  path = os.path.join(root, 'annotations', f'captions_{name}.json')
  captions = collections.defaultdict(list)
  if not storage.is_file(path):
    return captions
  content, seen = read_json(path), set()
  take_records(path, content, {}, 'annotations')
  _check_same_pictures(path, content, pictures)
  for record in content['annotations']:
    where = f'{path}: caption {shown(record.get("id"))}'
    caption_id, image_id = _key(record.get('id')), _key(record.get('image_id'))
    if image_id not in pictures:
      faults.append(fault(where, _UNLISTED, record.get('image_id')))
    elif caption_id in seen:
      faults.append(fault(where, _TWICE))
    else:
      try:
        captions[image_id].append(fields.filled_text(record.get('caption')))
      except Complaint as complaint:
        faults.append(Fault(f'{where}: {complaint}, left out', 'is no text, left out'))
    if caption_id is not None:
      seen.add(caption_id)
  return captions


def _check_same_pictures(path, content, pictures):
  """Raises UserError if the captions file lists another picture under an image_id."""
  records = content.get('images') if isinstance(content, dict) else None
  for record in records if isinstance(records, list) else ():
    image_id, name = map(record.get, ('id', 'file_name')) if isinstance(record, dict) else ('', '')
    other = pictures.get(_key(image_id), (name,))[0]
    if isinstance(name, str) and _base(name) != _base(other):
      raise UserError(f'{path}: image {shown(image_id)} is {shown(name)}, and {shown(other)} in '
                      'the file of boxes; take both files from one release')


def _base(file_name):
  return file_name.replace('\\', '/').rsplit('/', 1)[-1]


def _key(value):
  """The value as an id that joins records; None if it cannot be one."""
  if type(value) is int:
    return value
  try:
    return fields.identifier(value)
  except Complaint:
    return None


_PICTURE = {'id': fields.identifier, 'file_name': fields.path}
_CATEGORY = {'id': fields.identifier, 'name': fields.name}
