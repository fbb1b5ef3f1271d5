"""Readers of data on disk, and the checker of a user's own data."""

import builtins
import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from xmodal.data import check
from xmodal.data.example import Example, Object
from xmodal.data.pictures import images
from xmodal.data.sources.jsonl import read_jsonl
from xmodal.data.sources.vqa_rad import read_vqa_rad
from xmodal.data.sources.vqa_v2 import read_vqa_v2
from xmodal.errors import UserError
from xmodal.metrics.vqa import normalize_answer

_VQA_RAD = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'vqa_rad'
needs_vqa_rad = pytest.mark.skipif(
    not _VQA_RAD.is_dir(), reason=f'the published VQA-RAD files are not at {_VQA_RAD}')


def _picture(path, width=60, height=40, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  Image.fromarray(noise).save(path, **options)
  return path


def _folder(tmp_path, lines, split='train'):
  """A data folder with a.jpg and the lines given, objects or raw text."""
  _picture(tmp_path / 'a.jpg')
  text = '\n'.join(x if isinstance(x, str) else json.dumps(x) for x in lines)
  (tmp_path / f'{split}.jsonl').write_text(text + '\n', encoding='utf-8')
  return tmp_path


# Bring your own


def test_jsonl_reads_every_field(tmp_path):
  _picture(tmp_path / 'sub' / 'b.png')
  folder = _folder(tmp_path, [
      {'image': 'sub/b.png', 'question': ' How many? ', 'answers': ['2', 2, 2.0, 2.5, ' two '],
       'question_id': 7, 'caption': ['One.', 'Two.'], 'number': 3, 'question_type': 'count',
       'objects': [{'box': [1, 2, 3.5, 4], 'name': 'cat', 'ignore': False},
                   {'box': [0, 0, 9, 9], 'name': 'cats', 'ignore': True}],
       'expression': {'box': [1, 2, 3.5, 4], 'name': ' the cat on the left '},
       'image_id': 12, 'reason': 'I see them.'},
      {'image': 'a.jpg', 'answers': 'yes', 'question': 'Cat?', 'caption': 'A cat.',
       'objects': [], 'question_id': 'q8', 'number': None},
      {'image': 'a.jpg'}])
  assert read_jsonl(str(folder), 'train') == [
      Example(str(tmp_path / 'sub' / 'b.png'), 'How many?', ('2', '2', '2', '2.5', 'two'), 7,
              'count', ('One.', 'Two.'),
              (Object('cat', (1, 2, 3.5, 4)), Object('cats', (0, 0, 9, 9), ignore=True)),
              Object('the cat on the left', (1, 2, 3.5, 4)), 3.0, 'I see them.', image_id=12),
      Example(str(tmp_path / 'a.jpg'), 'Cat?', ('yes',), 'q8', captions=('A cat.',), objects=()),
      Example(str(tmp_path / 'a.jpg'))]


def test_jsonl_image_paths_are_absolute_and_open(tmp_path, monkeypatch):
  _folder(tmp_path, [{'image': 'a.jpg'}])
  monkeypatch.chdir(tmp_path.parent)
  [example] = read_jsonl(tmp_path.name, 'train')
  monkeypatch.chdir('/')
  assert Image.open(example.image).size == (60, 40)


def test_jsonl_takes_files_as_windows_and_unicode_write_them(tmp_path):
  _picture(tmp_path / 'größe 猫.jpg')
  # U+2028 ends a line for str.splitlines but not in JSON; lines end in CRLF.
  line = json.dumps({'image': 'größe 猫.jpg', 'question': 'a\u2028b?', 'answers': ['猫']},
                    ensure_ascii=False)
  (tmp_path / 'val.jsonl').write_bytes(
      f'\ufeff{line}\r\n\r\n   \r\n{line}'.encode())
  examples = read_jsonl(str(tmp_path), 'val')
  assert [(e.question, e.answers) for e in examples] == [('a\u2028b?', ('猫',))] * 2


def test_jsonl_says_once_which_keys_it_ignores(tmp_path, caplog):
  folder = _folder(tmp_path, [{'image': 'a.jpg', 'split': 1, 'source': 'x'}] * 50)
  assert len(read_jsonl(str(folder), 'train')) == 50
  [record] = caplog.records
  assert "'source', 'split'" in record.message


def test_jsonl_lists_a_folder_once_for_any_number_of_lines(tmp_path, monkeypatch):
  folder = _folder(tmp_path, ['{"image": "a.jpg"}'] * 100_000)
  listed = []
  scandir = os.scandir
  monkeypatch.setattr(os, 'scandir', lambda path: listed.append(path) or scandir(path))
  monkeypatch.setattr(os.path, 'exists', None)
  assert len(read_jsonl(str(folder), 'train')) == 100_000
  assert listed == [str(tmp_path)]


# A bad line, and its message.
_BAD_LINES = [
    ('{"image": "a.jpg"', 'not JSON .* column'),
    ('image: a.jpg', 'not JSON'),
    ('["a.jpg"]', 'wanted one JSON object a line'),
    ('"a.jpg"', 'wanted one JSON object a line'),
    ('[' * 100_000, 'not readable JSON|not JSON'),
    ('{"image": "a.jpg", "number": ' + '1' * 5000 + '}', 'not readable JSON'),
    ('{"image": "a.jpg", "number": NaN}', 'NaN, wanted finite'),
    ({'question': 'Who?'}, 'image is missing'),
    ({'image': ''}, 'wanted the path of a picture'),
    ({'image': 3}, 'image is 3, wanted the path'),
    ({'image': 'b.jpg'}, "image 'b.jpg' is not there"),
    ({'image': 'no/such/folder/b.jpg'}, 'is not there'),
    ({'image': 'a.jpg/b.jpg'}, 'is not there'),
    ({'image': 'sub'}, 'is not there'),
    ({'image': 'a\0.jpg/b'}, 'without control characters'),
    ({'image': 'a\udcff.jpg'}, 'without half characters'),
    ({'image': 'a' * 300 + '.jpg'}, 'is not there'),
    ({'image': 'a' * 300 + '/b.jpg'}, 'is not there'),
    ({'image': 'a/' * 3000 + 'b.jpg'}, 'is not there'),
    ({'image': 'a.jpg', 'question': ' ', 'answers': ['yes']}, 'question is empty'),
    ({'image': 'a.jpg', 'answers': ['yes']}, 'question is empty'),
    ({'image': 'a.jpg', 'question': ['Who?']}, 'question is .* wanted text'),
    ('{"image": "a.jpg", "question": "\\ud800"}', 'half characters'),
    ({'image': 'a.jpg', 'question': 'Who?', 'answers': [True]}, 'answers has True'),
    ({'image': 'a.jpg', 'question': 'Who?', 'answers': ['']}, 'answers has .* not empty'),
    ({'image': 'a.jpg', 'question': 'Who?', 'answers': {'a': 1}}, 'answers has'),
    ({'image': 'a.jpg', 'question_id': 1.5}, 'question_id is 1.5'),
    ({'image': 'a.jpg', 'question_type': 4}, 'question_type is 4'),
    ({'image': 'a.jpg', 'caption': [3]}, 'caption has 3'),
    ({'image': 'a.jpg', 'caption': ['a bell\7']}, r'caption has .*\\x07.*without control char'),
    ({'image': 'a.jpg', 'number': '3'}, "number is '3'"),
    ({'image': 'a.jpg', 'number': False}, 'number is False'),
    ({'image': 'a.jpg', 'number': 10**400}, 'wanted a finite number'),
    ({'image': 'a.jpg', 'objects': {'box': [1, 2, 3, 4], 'name': 'x'}}, 'objects is'),
    ({'image': 'a.jpg', 'objects': [{'box': [1, 2, 3, 4]}]}, 'objects 1 is'),
    ({'image': 'a.jpg', 'objects': [{'box': [1, 2, 3], 'name': 'x'}]}, r'box \[1, 2, 3\], wanted'),
    ({'image': 'a.jpg', 'objects': [{'box': '1 2 3 4', 'name': 'x'}]}, 'objects 1 has box'),
    ({'image': 'a.jpg', 'objects': [{'box': [1, 2, 3, '4'], 'name': 'x'}]}, 'numbers in pixels'),
    ({'image': 'a.jpg', 'objects': [{'box': [1, 2, 3, 4], 'name': ''}]}, 'name'),
    ({'image': 'a.jpg', 'objects': [{'box': [1, 2, 3, 4], 'name': 'x', 'ignore': 'no'}]},
     "objects 1 has ignore 'no', wanted true or false"),
    ({'image': 'a.jpg', 'expression': {'box': [1, 2, 3], 'name': 'x'}},
     r'expression has box \[1, 2, 3\], wanted'),
    ({'image': 'a.jpg', 'expression': 'the cat'}, "expression is 'the cat', wanted"),
    ({'image': 'a.jpg', 'image_id': [3]}, r'image_id is \[3\], wanted'),
]


@pytest.mark.parametrize('line, said', _BAD_LINES, ids=range(len(_BAD_LINES)))
def test_a_bad_line_stops_training_and_is_reported(tmp_path, capsys, line, said):
  (tmp_path / 'sub').mkdir()
  folder = _folder(tmp_path, [{'image': 'a.jpg'}, '', line, {'image': 'a.jpg'}])
  with pytest.raises(UserError, match=said) as raised:
    read_jsonl(str(folder), 'train')
  message = str(raised.value)
  assert message.startswith(f'{folder}/train.jsonl:3: ')
  assert f'xmodal check {folder}' in message and '\n' not in message
  assert check.main([str(folder)]) == 1
  report = capsys.readouterr().out
  assert f'{folder}/train.jsonl:3: ' in report
  assert 'train.jsonl: 3 lines, 2 good, 1 bad, 1 pictures' in report


def test_a_box_without_area_is_left_out_and_the_check_names_it(tmp_path, capsys):
  flat = {'box': [1, 2, 0, 4], 'name': 'x'}
  folder = _folder(tmp_path, [
      {'image': 'a.jpg'},
      {'image': 'a.jpg', 'objects': [{'box': [1, 2, 3, 4], 'name': 'y'}, flat]},
      {'image': 'a.jpg', 'objects': [{'box': [5, 2, -3, 4], 'name': 'x'}], 'expression': flat}])
  examples = read_jsonl(str(folder), 'train')
  assert [e.objects for e in examples] == [None, (Object('y', (1, 2, 3, 4)),), ()]
  assert examples[2].expression is None
  said = [f'{folder}/train.jsonl:2: objects 2: box [1, 2, 0, 4] has no area, left out',
          f'{folder}/train.jsonl:3: objects 1: box [5, 2, -3, 4] has no area, left out',
          f'{folder}/train.jsonl:3: expression: box [1, 2, 0, 4] has no area, left out']
  assert list(examples.faults) == said
  assert check.main([str(folder)]) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[:3] == said
  assert '3 lines, 1 good, 2 bad' in lines[3]


def test_a_line_that_is_not_utf8_is_named(tmp_path):
  _picture(tmp_path / 'a.jpg')
  (tmp_path / 'train.jsonl').write_bytes('{"image": "a.jpg"}\n{"image": "ü.jpg"}'.encode('latin1'))
  with pytest.raises(UserError, match=r'train\.jsonl:2: byte 12 is not UTF-8'):
    read_jsonl(str(tmp_path), 'train')


def test_folders_that_cannot_be_used(tmp_path, capsys):
  empty, no_lines, other = tmp_path / 'empty', tmp_path / 'no_lines', tmp_path / 'other'
  for folder in (empty, no_lines, other):
    folder.mkdir()
  (no_lines / 'train.jsonl').write_text('\n\n')
  (other / 'validation.jsonl').write_text('{}')
  for root, said in [
      (tmp_path / 'none', 'is not there, wanted a folder'), (empty, 'is empty'),
      (other / 'validation.jsonl', 'is a file, wanted a folder'), (no_lines, 'has no examples'),
      (other, r'train\.jsonl: no such file; .* validation\.jsonl'), ('', 'config.data.root')]:
    with pytest.raises(UserError, match=said):
      read_jsonl(str(root), 'train')
  for root in (tmp_path / 'none', empty, other):
    assert check.main([str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1


def _deny(monkeypatch, path):
  """Makes a file or folder one that this user may not read, which root always may."""
  def denying(real):
    def call(given, *args, **options):
      if given == str(path):
        raise PermissionError(errno.EACCES, 'Permission denied', given)
      return real(given, *args, **options)
    return call

  for module, name in [(os, 'scandir'), (os, 'listdir'), (builtins, 'open')]:
    monkeypatch.setattr(module, name, denying(getattr(module, name)))


def test_a_folder_of_pictures_that_may_not_be_read(tmp_path, capsys, monkeypatch):
  folder = _folder(tmp_path, [
      {'image': 'a.jpg'}, {'image': 'closed/b.jpg'}, {'image': 'closed/c.jpg'}])
  _deny(monkeypatch, folder / 'closed')
  with pytest.raises(UserError, match=r'train\.jsonl:2: .*/closed: cannot be read \(Perm') as error:
    read_jsonl(str(folder), 'train')
  assert '\n' not in str(error.value)
  assert check.main([str(folder)]) == 1
  assert '3 lines, 1 good, 2 bad' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['', 'train.jsonl'])
def test_data_that_may_not_be_read(name, tmp_path, monkeypatch):
  folder = _folder(tmp_path, [{'image': 'a.jpg'}])
  _deny(monkeypatch, folder / name)
  with pytest.raises(UserError, match=r'cannot be read \(Permission denied\)'):
    read_jsonl(str(folder), 'train')


def test_a_link_that_leads_nowhere_spoils_no_other_picture(tmp_path):
  folder = _folder(tmp_path, [{'image': 'a.jpg'}])
  (folder / 'loop.jpg').symlink_to('loop.jpg')
  assert len(read_jsonl(str(folder), 'train')) == 1
  _folder(folder, [{'image': 'loop.jpg'}])
  with pytest.raises(UserError, match="'loop.jpg' is not there"):
    read_jsonl(str(folder), 'train')


# The checker


def test_check_finds_what_only_decoding_shows(tmp_path, capsys):
  whole = _picture(tmp_path / 'whole.jpg').read_bytes()
  (tmp_path / 'cut.jpg').write_bytes(whole[:len(whole) * 2 // 3])
  cut_png = _picture(tmp_path / 'whole.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(cut_png[:len(cut_png) // 2])
  (tmp_path / 'text.jpg').write_text('not a picture')
  (tmp_path / 'empty.jpg').touch()
  turned = Image.Exif()
  turned[0x0112] = 6
  _picture(tmp_path / 'turned.jpg', exif=turned)

  def box(*sides):
    return [{'box': [1, 1, 1, 1], 'name': 'y'}, {'box': sides, 'name': 'x'}]

  folder = _folder(tmp_path, [
      {'image': 'cut.jpg'}, {'image': 'whole.jpg'}, {'image': 'cut.png'}, {'image': 'text.jpg'},
      {'image': 'empty.jpg'}, {'image': 'whole.jpg', 'objects': box(0, 0, 60, 40)},
      {'image': 'whole.jpg', 'objects': box(30, 30, 20, 20)},
      {'image': 'whole.jpg', 'objects': box(-5, 0, 20, 20)},
      {'image': 'turned.jpg', 'objects': box(0, 0, 40, 60)},
      {'image': 'turned.jpg', 'expression': box(0, 0, 60, 40)[1]},
      {'image': 'whole.jpg', 'question_id': 4}, {'image': 'whole.jpg', 'question_id': 4},
      {'image': 'whole.jpg', 'question_id': '4'}])
  assert check.main([str(folder)]) == 1
  lines = capsys.readouterr().out.splitlines()
  found = {int(line.split(':')[1]): line for line in lines if line.startswith(str(folder))}
  assert sorted(found) == [1, 3, 4, 5, 7, 8, 10, 12]
  for number in (1, 3, 4, 5):
    assert 'cannot be decoded' in found[number]
  assert 'objects 2 has box' in found[7] and 'inside 60 x 40' in found[7]
  assert 'expression has box' in found[10] and 'inside 40 x 60' in found[10]
  assert 'line 11' in found[12]
  assert 'test.jsonl: not there' in lines and lines[-1] == '8 bad lines'


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_check_and_training_agree_on_a_picture(tmp_path):
  """Truncated anywhere, with broken bytes or a broken EXIF block."""
  whole = _picture(tmp_path / 'whole.jpg', 300, 200).read_bytes()
  rng = np.random.default_rng(0)
  files = {f'cut{n}.jpg': whole[:n] for n in rng.integers(1, len(whole), 20)}
  files |= {f'odd{n}.jpg': whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1:]
            for n in rng.integers(20, len(whole), 20)}
  _picture(tmp_path / 'exif.jpg', exif=b'Exif\0\0MM\0*\0\0\xff\xff')
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  paths = [str(path) for path in sorted(tmp_path.glob('*.jpg'))]
  found = check.decode_all(paths)
  good = set()
  for path in paths:
    for size in [(48, 48), (224, 224)]:
      try:
        _, (height, width) = images.load_image(path, size)
        assert found[path] == (width, height)
        good.add(os.path.basename(path))
      except UserError as error:
        assert found[path] == str(error)
  assert {'whole.jpg', 'exif.jpg'} < good and not any(name.startswith('cut') for name in good)


def test_check_decodes_a_picture_once(tmp_path, monkeypatch):
  folder = _folder(tmp_path, [{'image': 'a.jpg'}] * 30)
  _folder(tmp_path, [{'image': 'a.jpg'}] * 30, split='val')
  decoded = []
  decode = images.decode
  monkeypatch.setattr(
      images, 'decode', lambda path, size: decoded.append(path) or decode(path, size))
  check.check_folder(str(folder))
  assert decoded == [str(tmp_path / 'a.jpg')]


def test_check_of_good_data_as_a_command(tmp_path):
  folder = _folder(tmp_path, [
      {'image': 'a.jpg', 'question': 'Is it red?', 'answers': ['yes']},
      {'image': 'a.jpg', 'question': 'Is it a big red cat?', 'answers': ['yes', 'no'], 'mine': 1},
      {'image': 'a.jpg', 'objects': []}])
  done = subprocess.run([sys.executable, '-m', 'xmodal.data.check', str(folder)],
                        capture_output=True, text=True, check=False,
                        cwd=pathlib.Path(__file__).parents[1])
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
      'train.jsonl: 3 lines, 3 good, 0 bad, 1 pictures',
      '  filled: question 2, answers 2, objects 1',
      "  answers: 2 different; 'yes' 67%, 'no' 33%",
      '  questions: 3 to 6 words, median 4.5',
      "  ignored keys 'mine' (known: image, image_id, question, answers, question_id, "
      'question_type, caption, objects, expression, number, reason, made)',
      'test.jsonl: not there', 'val.jsonl: not there', 'all good']


# VQA v2


def _vqa_v2(root, subtype='train2014', num_annotations=2, pictures=(9, 25)):
  """Two questions in the layout of visualqa.org."""
  questions = [{'image_id': 9, 'question': 'How many cookies?', 'question_id': 9000},
               {'image_id': 25, 'question': 'Is it day?', 'question_id': 25000}]
  (root / f'v2_OpenEnded_mscoco_{subtype}_questions.json').write_text(json.dumps(
      {'info': {}, 'task_type': 'Open-Ended', 'data_type': 'mscoco', 'license': {},
       'data_subtype': subtype, 'questions': questions}))
  answers = [['2'] * 9 + ['two'], ['yes'] * 10]
  annotations = [
      {'question_type': 'how many', 'multiple_choice_answer': people[0],
       'answers': [{'answer': answer, 'answer_confidence': 'yes', 'answer_id': i + 1}
                   for i, answer in enumerate(people)],
       'image_id': question['image_id'], 'answer_type': answer_type,
       'question_id': question['question_id']}
      for question, people, answer_type in zip(questions, answers, ('number', 'yes/no'))]
  if subtype != 'test2015':
    # The real files list annotations in another order.
    (root / f'v2_mscoco_{subtype}_annotations.json').write_text(
        json.dumps({'annotations': annotations[::-1][:num_annotations]}))
  for number in pictures:
    _picture(root / subtype / f'COCO_{subtype}_{number:012d}.jpg')
  return str(root)


def test_vqa_v2_joins_questions_annotations_and_pictures(tmp_path):
  assert read_vqa_v2(_vqa_v2(tmp_path), 'train') == [
      Example(f'{tmp_path}/train2014/COCO_train2014_000000000009.jpg', 'How many cookies?',
              ('2',) * 9 + ('two',), 9000, 'number'),
      Example(f'{tmp_path}/train2014/COCO_train2014_000000000025.jpg', 'Is it day?',
              ('yes',) * 10, 25000, 'yes/no')]


def test_vqa_v2_test_has_no_answers(tmp_path):
  examples = read_vqa_v2(_vqa_v2(tmp_path, 'test2015'), 'test')
  assert [(e.question_id, e.answers, e.question_type) for e in examples] == [
      (9000, (), ''), (25000, (), '')]


def test_vqa_v2_problems_are_reported_in_one_line(tmp_path):
  def said(name, **options):
    folder = tmp_path / name
    folder.mkdir()
    return _vqa_v2(folder, **options)

  with pytest.raises(UserError, match='1 questions have no annotation'):
    read_vqa_v2(said('pairs', num_annotations=1), 'train')
  with pytest.raises(UserError, match=r'1 of 2 pictures are not in .*COCO_train2014_0+25\.jpg'):
    read_vqa_v2(said('pictures', pictures=(9,)), 'train')
  with pytest.raises(UserError, match='val2014_questions.json: no such file'):
    read_vqa_v2(said('split'), 'val')
  with pytest.raises(UserError, match='no split .*train, val, test'):
    read_vqa_v2(said('name'), 'validation')
  path = pathlib.Path(said('cut')) / 'v2_OpenEnded_mscoco_train2014_questions.json'
  path.write_text('{"questions": [\n{"question_id": 1,')
  with pytest.raises(UserError, match=r'questions\.json:2: broken JSON .*column [0-9]+, character'):
    read_vqa_v2(str(path.parent), 'train')
  for text, wanted in [('[]', "list under 'questions'"), ('{"questions": []}', 'at least one'),
                       ('{"questions": [{"question_id": 1}]}', r'record 0 .*image_id')]:
    path.write_text(text)
    with pytest.raises(UserError, match=wanted):
      read_vqa_v2(str(path.parent), 'train')
  path = pathlib.Path(said('empty')) / path.name
  text = path.read_text()
  for question in ('" "', 'null'):
    path.write_text(text.replace('"Is it day?"', question))
    with pytest.raises(UserError, match='questions.json: question_id 25000: question is empty'):
      read_vqa_v2(str(path.parent), 'train')


# VQA-RAD, as published


@needs_vqa_rad
def test_vqa_rad_counts_are_the_published_ones():
  splits = {split: read_vqa_rad(str(_VQA_RAD), split)
            for split in ('train', 'val', 'train+val', 'test')}
  types = [example.question_type for example in splits['test']]
  assert (types.count('closed'), types.count('open'), len(types)) == (272, 179, 451)
  assert len(splits['train+val']) == 1797
  ids = {split: {e.question_id for e in examples} for split, examples in splits.items()}
  assert len(ids['train+val'] | ids['test']) == 2248
  assert ids['train'] | ids['val'] == ids['train+val'] and not ids['train'] & ids['val']
  assert {e.question_type for e in splits['train']} == {'closed', 'open'}
  examples = splits['train+val'] + splits['test']
  assert len({e.image for e in examples}) == 314
  assert all(e.answers[0] == e.answers[0].strip() != '' for e in examples)
  assert Image.open(examples[0].image).size[0] > 100


def _unseen_answers(train, held_out):
  seen = {normalize_answer(e.answers[0]) for e in train}
  return np.mean([normalize_answer(e.answers[0]) not in seen for e in held_out])


@needs_vqa_rad
def test_vqa_rad_val_imitates_test():
  train, val, test = (read_vqa_rad(str(_VQA_RAD), split) for split in ('train', 'val', 'test'))
  assert _unseen_answers(train + val, test) == pytest.approx(0.25, abs=0.01)
  assert _unseen_answers(train, val) == pytest.approx(0.25, abs=0.03)
  open_val, open_test = (
      np.mean([e.question_type == 'open' for e in examples]) for examples in (val, test))
  assert open_val == pytest.approx(open_test, abs=0.03)
  pictures = {e.image for e in train}
  assert np.mean([e.image in pictures for e in val]) > 0.95
  # Linked rephrasings stay in the same split.
  records = json.loads((_VQA_RAD / 'VQA_RAD Dataset Public.json').read_text('utf-8'))
  linked = {int(r['qid']): r['qid_linked_id'] for r in records}
  groups = [{linked[e.question_id] for e in examples} for examples in (train, val, test)]
  assert len(set.union(*groups)) == sum(map(len, groups))


def test_vqa_rad_problems_are_reported_in_one_line(tmp_path):
  with pytest.raises(UserError, match=r'no split .*train\+val'):
    read_vqa_rad(str(tmp_path), 'dev')
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(UserError, match='Public.json: no such file'):
    read_vqa_rad(str(tmp_path), 'test')
  record = {'qid': 1, 'qid_linked_id': 'x', 'phrase_type': 'test_para', 'image_name': 'a.jpg',
            'question': 'Where?', 'answer': 3, 'answer_type': 'OPEN '}
  (tmp_path / 'VQA_RAD Dataset Public.json').write_text(json.dumps([record]))
  with pytest.raises(UserError, match='1 of 1 pictures are not in .*a.jpg; unpack'):
    read_vqa_rad(str(tmp_path), 'test')
  picture = _picture(tmp_path / 'VQA_RAD Image Folder' / 'a.jpg')
  assert read_vqa_rad(str(tmp_path), 'test') == [
      Example(str(picture), 'Where?', ('3',), 1, 'open')]
  for question in (' ', None):
    (tmp_path / 'VQA_RAD Dataset Public.json').write_text(
        json.dumps([{**record, 'question': question}]))
    with pytest.raises(UserError, match='Public.json: question_id 1: question is empty'):
      read_vqa_rad(str(tmp_path), 'test')
