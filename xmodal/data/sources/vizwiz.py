"""VizWiz-VQA (Gurari et al., CVPR 2018): questions of blind people about their own pictures."""

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.faults import Examples, fault
from xmodal.data.sources.files import check_unique, existing_folder, read_records, split_file
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.source import SOURCES

_QUESTION = {
    'image': fields.path, 'question': fields.text,
    'answers': fields.optional(fields.list_of(fields.member('answer', fields.answer)), ()),
    'answer_type': fields.optional(fields.text, '')}


@SOURCES.register('vizwiz')
def read_vizwiz(root: str, split: str) -> Examples:
  """Reads questions, their ten answers and the paths of their pictures.

  The folder holds {split}.json (here, in Annotations/ or in annotations/) and the pictures in
  {split}/. Layout: vizwiz.org/tasks-and-datasets/vqa, and
  big_vision/datasets/vizwizvqa/vizwizvqa.py of google-research/big_vision.

  Args:
    root: the folder.
    split: 'train', 'val' or 'test'; test has no answers.

  Returns:
    Examples in the order of the file. 'unanswerable' is an answer like any other. question_type
    is the answer_type: 'yes/no', 'number', 'other' or 'unanswerable', '' in test; question_id is
    the picture's name: each has one question. Faults are empty questions and answers, which are
    left out.

  Raises:
    UserError: a file or picture is missing or invalid, or two questions are about one picture.
  """
  root = existing_folder(root, 'Annotations/train.json and pictures in train')
  name = f'{split}.json'
  path = split_file(root, f'Annotations/{name}', f'annotations/{name}', name)
  records = read_records(path, _QUESTION)
  check_unique(path, 'image', (image for image, *_ in records))
  paths = find_all(root, (image for image, *_ in records), (split,))
  examples, faults = [], []
  for image, question, answers, kind in records:
    where = f'{path}: {fields.shown(image)}'
    given = tuple(answer for answer in answers if answer.strip())
    faults += [fault(where, 'has an empty answer, left out')] * (len(answers) - len(given))
    if not question.strip():
      faults.append(fault(where, 'has an empty question, left out'))
      continue
    examples.append(Example(image=paths[image], question=question, answers=given,
                            question_id=image, question_type=kind))
  return Examples(examples, faults)
