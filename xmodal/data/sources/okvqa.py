"""OK-VQA (Marino et al., CVPR 2019): questions that need knowledge from outside of the picture."""

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.sources.files import check_split, existing_folder
from xmodal.data.sources.source import SOURCES
from xmodal.data.sources.vqa_v2 import read_questions

_SUBTYPES = {'train': 'train2014', 'val': 'val2014'}
_TOPICS = {
    'one': 'Vehicles and Transportation', 'two': 'Brands, Companies and Products',
    'three': 'Objects, Material and Clothing', 'four': 'Sports and Recreation',
    'five': 'Cooking and Food', 'six': 'Geography, History, Language and Culture',
    'seven': 'People and Everyday life', 'eight': 'Plants and Animals',
    'nine': 'Science and Technology', 'ten': 'Weather and Climate', 'other': 'Other'}


@SOURCES.register('okvqa')
def read_okvqa(root: str, split: str) -> list[Example]:
  """Reads questions, their ten answers and the paths of their COCO pictures.

  The folder holds, for train2014 and val2014 (the split on which scores are published):
  OpenEnded_mscoco_{subtype}_questions.json, mscoco_{subtype}_annotations.json,
  {subtype}/COCO_{subtype}_000000000009.jpg. Layout and topics: okvqa.allenai.org, and
  big_vision/datasets/okvqa/okvqa.py of google-research/big_vision.

  Args:
    root: the folder.
    split: 'train' or 'val'.

  Returns:
    Examples in the order of the questions file; question_type is the topic, such as
    'Cooking and Food'.

  Raises:
    UserError: as read_vqa_v2.
  """
  check_split('OK-VQA', split, _SUBTYPES)
  subtype = _SUBTYPES[split]
  root = existing_folder(
      root, f'OpenEnded_mscoco_{subtype}_questions.json and pictures in {subtype}')
  return read_questions(root, subtype, '', {'question_type': _topic})


def _topic(value):
  return _TOPICS.get(kind := fields.text(value), kind)
