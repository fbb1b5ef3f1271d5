"""COCO's instances (Lin et al., ECCV 2014), and what people export in its format."""

import collections
import math
import os
import sys
from typing import Any

from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, fault, picture_size, usable_box
from xmodal.data.files import (
    MissingSplit, Pictures, check_present, existing_folder, read_json, shown, take_records)
from xmodal.errors import UserError

# What a split is called in the files, if not by its own name.
_CALLED = {'train': ('train2017', 'train2014'), 'val': ('val2017', 'val2014', 'valid'),
           'test': ('test-dev2017', 'test2017', 'test2014'), 'test-dev': ('test-dev2017',)}
_FILES = ('annotations/instances_{}.json', 'annotations/image_info_{}.json',
          'annotations/{}.json', '{}.json', '{}/_annotations.coco.json')
_FOLDERS = ('{}', 'images/{}', 'images', '')

_UNLISTED = 'image_id {} is not listed, left out'


def read_coco(root: str, split: str) -> Examples:
  """Reads boxes, names and, where there are any, captions of COCO or data in its format.

  The annotations are the first of these that is there, first for the split's own
  name, then for COCO's (train2017 or train2014 for train, test-dev2017 for test)
  and Roboflow's (valid for val):
  annotations/instances_{split}.json, annotations/image_info_{split}.json (no
  boxes), annotations/{split}.json, {split}.json, {split}/_annotations.coco.json.
  Captions are in annotations/captions_{split}.json. A picture's file_name is
  looked for in {split}/ (by either name), images/{split}/, images/ and the
  folder itself.

  Args:
    root: the folder.
    split: such as 'train', 'val', 'test', or as in the files, such as 'val2014'.

  Returns:
    Examples in the order of the file's images, their faults in that of its
    annotations. An object's ignore is iscrowd; area is that of the outline even
    where the box was clipped; boxes are as in the file. A file without a list of
    annotations gives objects None.

  Raises:
    UserError: a file or picture is missing or not what it should be, or two
      pictures or two categories share an id.
  """
  root = existing_folder(root, 'annotations/instances_train2017.json and pictures')
  name, path = _find(root, split)
  content = read_json(path, _without_outlines)
  faults = []
  pictures = _read_pictures(path, content, faults)
  found = _read_objects(path, content, pictures, faults)
  captions = _read_captions(root, name, pictures, faults)
  files, missing, examples = Pictures(root), [], []
  folders = list(dict.fromkeys(folder.format(called) for folder in _FOLDERS
                               for called in (name.replace('-dev', ''), split)))
  for image_id, (file_name, _) in pictures.items():
    paths = (files.find(os.path.join(folder, file_name)) for folder in folders)
    image = next((path for path in paths if path), None)
    if image is None:
      missing.append(file_name)
      continue
    objects = None if found is None else tuple(found.get(image_id, ()))
    examples.append(Example(image=image, image_id=image_id, objects=objects,
                            captions=tuple(captions.get(image_id, ()))))
  check_present(missing, len(pictures), f'{root} ({", ".join(folders[:-1])})')
  return Examples(examples, faults)


def _find(root, split):
  """What the files call a split, and the path of its annotations."""
  names = (split, *_CALLED.get(split, ()))
  for name in names:
    for file in _FILES:
      path = os.path.join(root, file.format(name))
      if os.path.isfile(path):
        return name, path
  wanted = ', '.join(file.format(split) for file in _FILES)
  raise MissingSplit(f'{root} has no annotations of {split!r}, wanted one of {wanted}, or of '
                     f'{", ".join(names[1:]) or "another split"}')


def _without_outlines(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object as read: outlines are nine tenths of the file, and nothing uses them."""
  record = dict(pairs)
  record.pop('segmentation', None)
  return record


def _read_pictures(path, content, faults):
  """image_id -> (file_name, (width, height))."""
  pictures = {}
  records = take_records(path, content, ('id', 'file_name'), 'images')
  for (image_id, file_name), record in zip(records, content['images']):
    if not _is_id(image_id) or not isinstance(file_name, str):
      raise UserError(f'{path}: image {shown(image_id)} has file_name {shown(file_name)}, wanted '
                      'a number or text and the name of a file')
    if image_id not in pictures:
      size = picture_size(record.get('width'), record.get('height'))
      pictures[image_id] = file_name, size
    elif pictures[image_id][0] == file_name:
      faults.append(fault(f'{path}: image {shown(image_id)}', 'is listed twice, kept once'))
    else:
      raise UserError(f'{path}: image id {image_id!r} is that of {pictures[image_id][0]} and of '
                      f'{file_name}, wanted one of its own: which of them an annotation means '
                      'cannot be known')
  return pictures


def _read_categories(path, content):
  """category_id -> name, of those that have one."""
  records = content.get('categories')
  names = {}
  for record in records if isinstance(records, list) else ():
    record = record if isinstance(record, dict) else {}
    category_id, name = record.get('id'), record.get('name')
    if not _is_id(category_id) or not isinstance(name, str) or not name.strip():
      continue  # its annotations are left out, and said
    name = sys.intern(name.strip())
    if names.setdefault(category_id, name) != name:
      raise UserError(f'{path}: category id {category_id!r} is that of {names[category_id]!r} and '
                      f'of {name!r}, wanted one of its own')
  return names


def _read_objects(path, content, pictures, faults):
  """image_id -> list of Objects; None where the file has no annotations."""
  annotations = content.get('annotations')
  if annotations is None:
    return None
  if not isinstance(annotations, list):
    raise UserError(f'{path}: annotations are {shown(annotations)}, wanted a list')
  names = _read_categories(path, content)
  found, seen = collections.defaultdict(list), set()
  for number, record in enumerate(annotations):
    image_id, thing, what, value = _read_object(record, pictures, names, seen)
    if what:
      name = record.get('id') if isinstance(record, dict) else None
      where = f'[{number}]' if name is None else f' {shown(name)}'
      faults.append(fault(f'{path}: annotation{where}', what, value))
    if thing:
      found[image_id].append(thing)
  return found


def _read_object(record, pictures, names, seen):
  """One annotation -> image_id, Object or None, what is wrong or '', and the value found."""
  if not isinstance(record, dict):
    return None, None, 'is {}, left out', record
  annotation_id, image_id, category_id, box = map(
      record.get, ('id', 'image_id', 'category_id', 'bbox'))
  if not _is_id(image_id) or image_id not in pictures:
    return None, None, _UNLISTED, image_id
  if not _is_id(category_id) or category_id not in names:
    return None, None, 'category_id {} has no name, left out', category_id
  if _is_id(annotation_id):
    if annotation_id in seen:
      return None, None, 'has the id of an earlier one, left out', ''
    seen.add(annotation_id)
  usable, what = usable_box(box, pictures[image_id][1])
  if usable is None:
    return None, None, what, box
  area = record.get('area')
  area = float(area) if isinstance(area, (int, float)) and 0 <= area < math.inf else None
  thing = Object(names[category_id], usable, record.get('iscrowd') == 1, area, category_id)
  return image_id, thing, what, box


def _read_captions(root, name, pictures, faults):
  """image_id -> list of captions; empty where there is no file of them."""
  path = os.path.join(root, 'annotations', f'captions_{name}.json')
  captions = collections.defaultdict(list)
  if not os.path.isfile(path):
    return captions
  records = take_records(path, read_json(path), ('id', 'image_id', 'caption'), 'annotations')
  for caption_id, image_id, caption in records:
    where = f'{path}: caption {shown(caption_id)}'
    if not _is_id(image_id) or image_id not in pictures:
      faults.append(fault(where, _UNLISTED, image_id))
    elif not isinstance(caption, str) or not caption.strip():
      faults.append(fault(where, 'is {}, wanted text, left out', caption))
    else:
      captions[image_id].append(caption.strip())
  return captions


def _is_id(value):
  return isinstance(value, (int, str))
