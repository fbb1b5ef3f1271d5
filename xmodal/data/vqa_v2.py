"""VQA v2 (Goyal et al., CVPR 2017) as visualqa.org distributes it."""

import os
import sys

from xmodal.data.example import Example
from xmodal.data.files import Pictures, check_present, existing_folder, read_records
from xmodal.data.jsonl import check_asked
from xmodal.errors import UserError

_SUBTYPES = {'train': 'train2014', 'val': 'val2014', 'test': 'test2015'}


def read_vqa_v2(root: str, split: str) -> list[Example]:
  """Reads questions, their ten answers and the paths of their COCO pictures.

  The folder holds, for train2014, val2014 and test2015 (whichever are used):
  v2_OpenEnded_mscoco_{subtype}_questions.json,
  v2_mscoco_{subtype}_annotations.json (none for test2015),
  {subtype}/COCO_{subtype}_000000000009.jpg.

  Args:
    root: the folder.
    split: 'train', 'val' or 'test', which has no answers.

  Returns:
    Examples in the order of the questions file; question_type is the
    annotations' answer_type: 'yes/no', 'number' or 'other', '' in test.

  Raises:
    UserError: a file or picture is missing or not what it should be, a question
      that was answered is empty, or the two files do not belong together.
  """
  if split not in _SUBTYPES:
    raise UserError(f'VQA v2 has no split {split!r}, wanted one of {", ".join(_SUBTYPES)}')
  subtype = _SUBTYPES[split]
  root = existing_folder(
      root, f'v2_OpenEnded_mscoco_{subtype}_questions.json and pictures in {subtype}')
  path = os.path.join(root, f'v2_OpenEnded_mscoco_{subtype}_questions.json')
  questions = read_records(path, ('question_id', 'image_id', 'question'), 'questions')
  answers = {} if split == 'test' else _read_answers(root, subtype, {q[0] for q in questions})
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
  check_present(list(missing), len({image_id for _, image_id, _ in questions}), root)
  check_asked(examples, path)
  return examples


def _read_answers(root, subtype, question_ids):
  """question_id -> (answers, answer type), for exactly the questions asked."""
  path = os.path.join(root, f'v2_mscoco_{subtype}_annotations.json')
  records = read_records(path, ('question_id', 'answers', 'answer_type'), 'annotations')
  # The same few thousand answers fill four million places: keep one copy of each.
  answers = {question_id: (tuple(sys.intern(person['answer']) for person in people), answer_type)
             for question_id, people, answer_type in records}
  if answers.keys() != question_ids:
    raise UserError(
        f'{path}: {len(question_ids - answers.keys())} questions have no annotation and '
        f'{len(answers.keys() - question_ids)} annotations no question, wanted one each; '
        'take both files from one release')
  return answers
