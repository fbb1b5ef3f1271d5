"""VQA v2 (Goyal et al., CVPR 2017) as visualqa.org distributes it."""

import os

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.fields import shown
from xmodal.data.sources.files import check_unique, existing_folder, read_records
from xmodal.data.sources.jsonl import check_questions
from xmodal.data.sources.pictures import Pictures, check_present
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_SUBTYPES = {'train': 'train2014', 'val': 'val2014', 'test': 'test2015'}
_QUESTION = {'question_id': fields.identifier, 'image_id': fields.whole_number,
             'question': fields.optional(fields.text, '')}
_ANNOTATION = {'question_id': fields.identifier, 'image_id': fields.optional(fields.whole_number),
               'answers': fields.list_of(fields.member('answer', fields.answer)),
               'answer_type': fields.text}


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
  if split not in _SUBTYPES:
    raise UserError(f'VQA v2 has no split {split!r}, wanted one of {", ".join(_SUBTYPES)}')
  subtype = _SUBTYPES[split]
  root = existing_folder(
      root, f'v2_OpenEnded_mscoco_{subtype}_questions.json and pictures in {subtype}')
  path = os.path.join(root, f'v2_OpenEnded_mscoco_{subtype}_questions.json')
  questions = read_records(path, _QUESTION, 'questions')
  check_unique(path, 'question_id', (question_id for question_id, *_ in questions))
  answers = {} if split == 'test' else _read_answers(
      root, subtype, {question_id: image_id for question_id, image_id, _ in questions})
  pictures, missing, examples = Pictures(root), {}, []
  for question_id, image_id, question in questions:
    name = os.path.join(subtype, f'COCO_{subtype}_{image_id:012d}.jpg')
    image = pictures.find(name)
    if image is None:
      missing[name] = None
      continue
    given, answer_type = answers.get(question_id, ((), ''))
    examples.append(Example(image=image, question=question, answers=given,
                            question_id=question_id, question_type=answer_type))
  check_present(list(missing), len({image_id for _, image_id, _ in questions}), root, pictures)
  check_questions(examples, path)
  return examples


def _read_answers(root, subtype, image_ids):
  """question_id -> (answers, answer type); their ids and images must be those in `image_ids`.

  image_ids: question_id -> image_id.
  """
  path = os.path.join(root, f'v2_mscoco_{subtype}_annotations.json')
  records = read_records(path, _ANNOTATION, 'annotations')
  check_unique(path, 'question_id', (question_id for question_id, *_ in records))
  answers = {question_id: (given, answer_type) for question_id, _, given, answer_type in records}
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
