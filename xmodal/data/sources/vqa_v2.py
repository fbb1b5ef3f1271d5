"""VQA v2 (Goyal et al., CVPR 2017) as visualqa.org distributes it."""

from collections.abc import Mapping
import os

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.fields import Check, shown
from xmodal.data.sources.files import (
  check_split,
  check_unique,
  existing_folder,
  read_records,
  split_file,
)
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.jsonl import check_questions
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_SUBTYPES = {'train': 'train2014', 'val': 'val2014', 'test': 'test2015'}
_QUESTION = {'question_id': fields.identifier, 'image_id': fields.whole_number,
             'question': fields.optional(fields.text, '')}
_ANSWERS = {'question_id': fields.identifier, 'image_id': fields.optional(fields.whole_number),
            'answers': fields.list_of_members('answer', fields.answer)}


@SOURCES.register('vqa_v2')
def read_vqa_v2(root: str, split: str) -> list[Example]:
  """Reads questions, their ten answers and the paths of their COCO pictures.

  The folder holds, for train2014, val2014 and test2015 (whichever are used):
  v2_OpenEnded_mscoco_{subtype}_questions.json,
  v2_mscoco_{subtype}_annotations.json (none for test2015),
  {subtype}/COCO_{subtype}_000000000009.jpg.

  Args:
    root: the folder.
    split: 'train', 'val' or 'test'; test has no answers.

  Returns:
    Examples in the order of the questions file; question_type is the
    annotations' answer_type: 'yes/no', 'number' or 'other', '' in test.

  Raises:
    UserError: a file or picture is missing or invalid, a question with answers is
      empty, two share a question_id, or the two files do not belong together.
  """
  check_split('VQA v2', split, _SUBTYPES)
  subtype = _SUBTYPES[split]
  root = existing_folder(
      root, f'v2_OpenEnded_mscoco_{subtype}_questions.json and pictures in {subtype}')
  return read_questions(root, subtype, 'v2_', {'answer_type': fields.text},
                        answered=split != 'test')


def read_questions(root: str, subtype: str, version: str, question_type: Mapping[str, Check],
                   answered: bool = True) -> list[Example]:
  """Reads the files of a data set in the format of VQA v2.

  Args:
    root: absolute path of the folder.
    subtype: COCO's name of the split: 'train2014'.
    version: beginning of the files' names: 'v2_'.
    question_type: the field of the annotations that becomes question_type -> its check.
    answered: whether there are annotations.

  Returns, Raises: as read_vqa_v2.
  """
  path = split_file(root, f'{version}OpenEnded_mscoco_{subtype}_questions.json')
  questions = read_records(path, _QUESTION, 'questions')
  check_unique(path, 'question_id', (question_id for question_id, *_ in questions))
  answers = {} if not answered else _read_answers(
      os.path.join(root, f'{version}mscoco_{subtype}_annotations.json'), question_type,
      {question_id: image_id for question_id, image_id, _ in questions})
  names = {image_id: os.path.join(subtype, f'COCO_{subtype}_{image_id:012d}.jpg')
           for image_id in dict.fromkeys(image_id for _, image_id, _ in questions)}
  paths = find_all(root, names.values())
  examples = []
  for question_id, image_id, question in questions:
    given, kind = answers.get(question_id, ((), ''))
    examples.append(Example(image=paths[names[image_id]], question=question, answers=given,
                            question_id=question_id, question_type=kind))
  check_questions(examples, path)
  return examples


def _read_answers(path, question_type, image_ids):
  """question_id -> (answers, question type); their ids and images must be those in `image_ids`.

  image_ids: question_id -> image_id.
  """
  records = read_records(path, _ANSWERS | question_type, 'annotations')
  check_unique(path, 'question_id', (question_id for question_id, *_ in records))
  answers = {question_id: (given, kind) for question_id, _, given, kind in records}
  if answers.keys() != image_ids.keys():
    raise UserError(
        f'{path}: {len(image_ids.keys() - answers.keys())} questions have no annotation and '
        f'{len(answers.keys() - image_ids.keys())} annotations no question, wanted one each; '
        'take both files from one release')
  for question_id, image_id, *_ in records:
    if image_id not in (None, image_ids[question_id]):
      raise UserError(f'{path}: question_id {shown(question_id)} is about image {image_id}, and '
                      f'about image {image_ids[question_id]} in the file of questions; take both '
                      'files from one release')
  return answers
