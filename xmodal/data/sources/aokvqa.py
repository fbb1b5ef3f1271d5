"""A-OKVQA (Schwenk et al., ECCV 2022): questions that need knowledge, with reasons."""

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.sources.files import check_unique, existing_folder, read_records, split_file
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.options import Option

_QUESTION = {
    'question_id': fields.identifier, 'image_id': fields.whole_number,
    'question': fields.filled_text,
    'direct_answers': fields.optional(fields.list_of(fields.answer), ()),
    'difficult_direct_answer': fields.optional(fields.flag, False),
    'rationales': fields.optional(fields.list_of(fields.trimmed), ()),
    'choices': fields.optional(fields.list_of(fields.answer), ()),
    'correct_choice_idx': fields.optional(fields.whole_number)}


@SOURCES.register('aokvqa', options={'multiple_choice': Option(
    False, 'A-OKVQA: append the choices to each question; the right one is its only answer.')})
def read_aokvqa(root: str, split: str, multiple_choice: bool = False) -> list[Example]:
  """Reads questions, their ten direct answers and the paths of their COCO pictures.

  The folder holds aokvqa_v1p0_{split}.json and {split}2017/000000000009.jpg. Layout:
  load_aokvqa.py of allenai/aokvqa.

  Args:
    root: the folder.
    split: 'train', 'val' or 'test'; test has no answers.
    multiple_choice: whether to append the choices, 'What is it? cat, dog, cow, bus', and to give
      the right one as the only answer.

  Returns:
    Examples in the order of the file; question_type is 'difficult' if people's direct answers
    differ so much that the official score leaves them out, otherwise 'direct'; with
    multiple_choice 'choice'. reason is the first rationale.

  Raises:
    UserError: a file or picture is missing or invalid, a question is empty, or two share a
      question_id.
  """
  root = existing_folder(root, 'aokvqa_v1p0_train.json and pictures in train2017')
  path = split_file(root, f'aokvqa_v1p0_{split}.json')
  records = read_records(path, _QUESTION)
  check_unique(path, 'question_id', (question_id for question_id, *_ in records))
  paths = find_all(root, (_picture(split, image_id) for _, image_id, *_ in records))
  examples = []
  for question_id, image_id, question, answers, difficult, reasons, offered, right in records:
    kind = 'difficult' if difficult else 'direct'
    if multiple_choice:
      question, kind = f'{question} {", ".join(offered)}', 'choice'
      if right is not None and not 0 <= right < len(offered):
        raise UserError(f'{path}: question_id {fields.shown(question_id)}: correct_choice_idx is '
                        f'{right}, wanted one of {len(offered)} choices, from 0')
      answers = () if right is None else (offered[right],)
    examples.append(Example(
        image=paths[_picture(split, image_id)], question=question, answers=answers,
        question_id=question_id, question_type=kind, reason=next(filter(None, reasons), '')))
  return examples


def _picture(split, image_id):
  return f'{split}2017/{image_id:012d}.jpg'
