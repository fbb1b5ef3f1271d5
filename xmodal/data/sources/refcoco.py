"""RefCOCO, RefCOCO+ (Yu et al., ECCV 2016) and RefCOCOg (Mao et al., CVPR 2016)."""

import os

from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, fault, known_size, usable_name
from xmodal.data.sources.coco import read_instances
from xmodal.data.sources.files import MissingSplit, existing_folder, split_file, take_records
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.plain_pickle import read_plain_pickle
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option

_AUTHORS = ('umd', 'unc', 'google')
_FOLDERS, _ABOVE = ('train2014', 'images'), ('train2014', 'images/mscoco/images/train2014')
_REFERENCE = {'ann_id': fields.identifier, 'image_id': fields.identifier, 'split': fields.text,
              'sentences': fields.list_of(fields.member('sent', lambda value: value))}


@SOURCES.register('refcoco', boxes=True, options={'split_by': Option(
    '', "RefCOCO: whose splits to read, refs(...).p; '': umd's, unc's or google's, the first of "
    'them that is there.', choices=('', *_AUTHORS))})
def read_refcoco(root: str, split: str, split_by: str = '') -> Examples:
  """Reads expressions and the boxes that they mean, as github.com/lichengunc/refer lays them out.

  The folder refcoco, refcoco+ or refcocog holds refs(unc).p, refs(google).p or refs(umd).p, and
  instances.json. COCO's pictures of 2014 are in ../images/mscoco/images/train2014, ../train2014,
  or in train2014 or images of the folder itself. The pickle is read as plain data: none of the
  code that it may hold is run.

  Args:
    root: the folder.
    split: 'train', 'val', 'testA', 'testB' or 'test'; test is all whose names begin with it.
    split_by: 'unc', 'google', 'umd' or ''. google's splits of refcocog share pictures.

  Returns:
    One Example per sentence, in the order of the file; objects are all that are annotated in the
    picture, as read_coco gives them. Faults are those of instances.json, empty sentences and
    objects that it lacks.

  Raises:
    UserError: a file or picture is missing or invalid.
  """
  root = existing_folder(root, 'refs(unc).p or refs(umd).p, and instances.json')
  authors = [split_by] if split_by else _AUTHORS
  path = split_file(root, *(f'refs({by}).p' for by in authors))
  references = take_records(path, read_plain_pickle(path), _REFERENCE)
  chosen = [reference for reference in references if reference[2] == split or (
      split == 'test' and reference[2].startswith('test'))]
  if not chosen:
    found = sorted({fields.shown(named) for _, _, named, _ in references})
    raise MissingSplit(f'{path} has no split {split!r}, wanted one of {", ".join(found)}')
  faults = []
  pictures, _, objects = read_instances(instances := os.path.join(root, 'instances.json'), faults)
  if objects is None:
    raise UserError(f'{instances}: has no annotations, wanted the boxes of objects')
  examples = []
  above = os.path.dirname(root)
  paths = find_all(
      root, (pictures[image_id][0] for _, image_id, *_ in chosen if image_id in pictures),
      (*_FOLDERS, *(os.path.join(above, folder) for folder in _ABOVE)))
  for number, image_id, _, sentences in chosen:
    where = f'{path}: object {fields.shown(number)}'
    things = objects.get(image_id, {})
    if number not in things:
      faults.append(fault(where, 'has no box in instances.json that can be used, left out'))
      continue
    file_name, size = pictures[image_id]
    for sentence in sentences:
      if name := usable_name(sentence, where, faults):
        examples.append(Example(
            image=paths[file_name], image_id=image_id, objects=tuple(things.values()),
            expression=Object(name, things[number].box), recorded_size=known_size(size)))
  if not examples:
    why = f'; the first fault: {faults[0]}' if faults else ''
    raise UserError(f'{path}: no expression of {split!r} can be used{why}')
  return Examples(examples, faults)
