"""GQA (Hudson and Manning, CVPR 2019): composed questions on pictures of Visual Genome."""

import os
from typing import Any

from xmodal import storage
from xmodal.data import fields
from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples, fault, known_size, picture_size, usable_box, usable_name
from xmodal.data.sources.files import existing_folder, read_json, split_file, take_records
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_TYPE = fields.optional(fields.text, '')
_QUESTION = {
    'id': fields.identifier, 'imageId': fields.identifier, 'question': fields.filled_text,
    'answer': fields.optional(fields.answer),
    'types': lambda value: '' if value is None else '/'.join(filter(None, (
        fields.member(kind, _TYPE)(value) for kind in ('structural', 'semantic'))))}


@SOURCES.register('gqa')
def read_gqa(root: str, split: str) -> Examples:
  """Reads the balanced questions of a split and, if present, its scene graphs.

  The folder holds {split}_balanced_questions.json (here, in questions1.2/ or in questions/),
  images/ and, for objects, train_sceneGraphs.json and val_sceneGraphs.json (here or in
  sceneGraphs/). Layout: cs.stanford.edu/people/dorarad/gqa/download.html, and
  big_vision/datasets/gqa/gqa.py of google-research/big_vision.

  Args:
    root: the folder.
    split: 'train', 'val', 'testdev', 'test' or 'challenge'; the last two have no answers.

  Returns:
    Examples in the order of the file; question_type is the structural and the semantic type:
    'query/attr'. objects is None without scene graphs.

  Raises:
    UserError: a file or picture is missing or invalid, or a question is empty.
  """
  root = existing_folder(root, 'train_balanced_questions.json and pictures in images')
  name = f'{split}_balanced_questions.json'
  path = split_file(root, name, f'questions1.2/{name}', f'questions/{name}')
  content = read_json(path, _without_programs)
  if not isinstance(content, dict):
    raise UserError(f'{path}: wanted questions by their ids, found {fields.shown(content)}')
  for question_id, record in content.items():
    if isinstance(record, dict):
      record['id'] = question_id
  questions = take_records(path, list(content.values()), _QUESTION)
  names = {image_id: f'{image_id}.jpg' for _, image_id, *_ in questions}
  paths = find_all(os.path.join(root, 'images'), names.values())
  faults, examples = [], []
  graphs = _read_graphs(root, split, set(map(str, names)), faults)
  for question_id, image_id, question, answer, kind in questions:
    objects, size = graphs.get(str(image_id), (None, None))
    examples.append(Example(
        image=paths[names[image_id]], image_id=image_id, question=question,
        answers=() if answer is None else (answer,), question_id=question_id, question_type=kind,
        objects=objects, recorded_size=size))
  return Examples(examples, faults)


def _without_programs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Keeps the fields of a question that are used: programs are most of a large file."""
  record = dict(pairs)
  return {key: record.get(key) for key in _QUESTION} if 'imageId' in record else record


def _read_graphs(root, split, image_ids, faults):
  """image_id as text -> (objects, recorded size), for the pictures with a scene graph."""
  name = f'{split}_sceneGraphs.json'
  path = next((path for folder in ('', 'sceneGraphs') if storage.is_file(
      path := os.path.join(root, folder, name))), None)
  if path is None:
    return {}
  content = read_json(path, _without_relations)
  if not isinstance(content, dict) or not content:
    raise UserError(f'{path}: wanted scene graphs by image, found {fields.shown(content)}')
  if not image_ids & content.keys():
    raise UserError(f'{path}: has no scene graph of a picture that the questions are about; take '
                    'both files from one release')
  graphs = {}
  for image_id, graph in content.items():
    if image_id not in image_ids:
      continue
    where = f'{path}: image {fields.shown(image_id)}'
    things = graph.get('objects') if isinstance(graph, dict) else graph
    if not isinstance(things, dict):
      faults.append(fault(where, 'has objects {}, left out', things))
      continue
    size = picture_size(graph, where, faults)
    found = (_object(thing, f'{where}: object {fields.shown(key)}', size, faults)
             for key, thing in things.items())
    graphs[image_id] = tuple(filter(None, found)), known_size(size)
  return graphs


def _object(thing, where, size, faults):
  """An Object of a scene graph; None if it cannot be used, which is added to faults."""
  if not isinstance(thing, dict):
    faults.append(fault(where, 'is {}, left out', thing))
    return None
  if not (name := usable_name(thing.get('name'), where, faults)):
    return None
  box = [thing.get(side) for side in 'xywh']
  usable, what = usable_box(box, size)
  if what:
    faults.append(fault(where, what, box))
  return usable and Object(name, usable)


def _without_relations(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = dict(pairs)
  record.pop('relations', None)
  record.pop('attributes', None)
  return record
