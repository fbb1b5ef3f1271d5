"""CLEVR (Johnson et al., CVPR 2017): questions about drawn scenes of simple solids."""

import os
from typing import Any

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.sources.files import (
  check_unique,
  existing_folder,
  read_json,
  split_file,
  take_records,
)
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.source import SOURCES

_QUESTION = {
    'question_index': fields.identifier, 'image_filename': fields.path,
    'question': fields.filled_text, 'answer': fields.optional(fields.answer),
    'program': fields.optional(fields.list_of(fields.member('function', fields.text)), ())}


@SOURCES.register('clevr')
def read_clevr(root: str, split: str) -> list[Example]:
  """Reads the questions of a split of CLEVR_v1.0, or of another set in its layout (CoGenT).

  The folder holds questions/CLEVR_{split}_questions.json and images/{split}/. Layout:
  scripts/preprocess_questions.py of facebookresearch/clevr-iep.

  Args:
    root: the folder CLEVR_v1.0.
    split: 'train', 'val' or 'test', of CoGenT 'trainA', 'valA', ...; test has no answers.

  Returns:
    Examples in the order of the file; question_type is the last function of the question's
    program: 'count', 'exist', 'query_color', 'equal_integer', ...; '' in test.

  Raises:
    UserError: a file or picture is missing or invalid, a question is empty, or two share a
      question_index.
  """
  root = existing_folder(root, 'questions/CLEVR_train_questions.json and pictures in images/train')
  path = split_file(root, os.path.join('questions', f'CLEVR_{split}_questions.json'))
  records = take_records(path, read_json(path, _shortened), _QUESTION, 'questions')
  check_unique(path, 'question_index', (question_id for question_id, *_ in records))
  paths = find_all(os.path.join(root, 'images', split), (name for _, name, *_ in records))
  return [
      Example(image=paths[name], question=question, question_id=question_id,
              answers=() if answer is None else (answer,),
              question_type=program[-1] if program else '')
      for question_id, name, question, answer, program in records]


def _shortened(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Keeps the last function of a question's program: programs are most of a large file."""
  record = dict(pairs)
  if isinstance(program := record.get('program'), list):
    record['program'] = program[-1:]
  return record
