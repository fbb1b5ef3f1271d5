"""NLVR2 (Suhr et al., ACL 2019): whether a sentence is true of two photographs."""

from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.fields import Complaint, check_fields, shown
from xmodal.data.pictures.images import SideBySide
from xmodal.data.sources.files import check_unique, existing_folder, split_file
from xmodal.data.sources.find_pictures import find_all
from xmodal.data.sources.jsonl import json_object, numbered_lines
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError

_NAMES = {'val': 'dev', 'test': 'test1'}  # split -> its name in the files


@SOURCES.register('nlvr2')
def read_nlvr2(root: str, split: str) -> list[Example]:
  """Reads sentences on pairs of pictures, of which it makes one picture each.

  The two pictures of a pair are laid side by side, the left one to the left, both in the smaller
  of their heights; this happens when a batch is made, so that reading the sentences opens none.

  The folder holds train.json, dev.json and test1.json (here, in data/ or in nlvr2/data/, as in
  github.com/lil-lab/nlvr), and pictures such as images/train/42/train-10171-0-img0.png,
  dev/dev-850-0-img1.png and test1/test1-0-0-img0.png; images/ may be left out or added. Layout:
  DATA.md of dandelin/ViLT.

  Args:
    root: the folder.
    split: 'train', 'val' (dev) or 'test' (test1), or a file's own name, such as 'test2'.

  Returns:
    Examples in the order of the file; the question is the sentence, the answer 'true' or 'false',
    image_id the pair.

  Raises:
    UserError: a file or picture is missing or invalid, or two sentences share an identifier.
  """
  root = existing_folder(root, 'nlvr2/data/train.json and pictures in images/train')
  name = _NAMES.get(split, split)
  path = split_file(root, f'{name}.json', f'data/{name}.json', f'nlvr2/data/{name}.json')
  records = [_parse(line, f'{path}:{number}') for number, line in numbered_lines(path)]
  if not records:
    raise UserError(f'{path}: has no sentences, wanted one JSON object a line')
  check_unique(path, 'identifier', (record['identifier'] for record in records))
  files = [_files(record, name) for record in records]
  paths = find_all(root, (file for pair in files for file in pair), ('images', ''))
  return [
      Example(image=SideBySide(paths[left], paths[right]), image_id=_pair(record),
              question=record['sentence'], question_id=record['identifier'],
              answers=() if record['label'] is None else (record['label'],))
      for record, (left, right) in zip(records, files)]


def _parse(line, where):
  """The checked fields of a line."""
  try:
    values, complaints = check_fields(json_object(line), _LINE)
  except Complaint as complaint:
    complaints = [str(complaint)]
  if complaints:
    raise UserError(f'{where}: {"; ".join(complaints)}')
  return values


def _pair(record):
  """The pair of an identifier, split-set-pair-sentence: the beginning of its pictures' names."""
  return record['identifier'].rpartition('-')[0]


def _files(record, name):
  """The left and the right picture; those of train are spread over numbered folders."""
  folder = name if record['directory'] is None else f'{name}/{record["directory"]}'
  return tuple(f'{folder}/{_pair(record)}-img{side}.png' for side in (0, 1))


def _label(value):
  label = str(value).lower() if isinstance(value, (bool, str)) else ''
  if label not in ('true', 'false'):
    raise Complaint(f'is {shown(value)}, wanted True or False')
  return label


_LINE = {'identifier': fields.filled_text, 'sentence': fields.filled_text,
         'label': fields.optional(_label), 'directory': fields.optional(fields.identifier)}
