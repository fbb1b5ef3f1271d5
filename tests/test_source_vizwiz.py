"""VizWiz-VQA as distributed."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.sources.vizwiz import read_vizwiz
from xmodal.errors import UserError

_QUESTION = {
    'image': 'VizWiz_val_00000000.jpg', 'question': 'Can you tell me what this is?',
    'answers': [{'answer': answer, 'answer_confidence': 'yes'}
                for answer in ['unanswerable'] * 7 + ['a can'] * 3],
    'answer_type': 'unanswerable', 'answerable': 0}


def _vizwiz(root, *questions, folder='Annotations/', split='val'):
  return published.write(root, {
      f'{folder}{split}.json': list(questions), f'{split}/VizWiz_val_00000000.jpg': (60, 40),
      f'{split}/VizWiz_val_00000001.jpg': (60, 40)})


@pytest.mark.parametrize('folder', ['Annotations/', 'annotations/', ''])
def test_unanswerable_is_an_answer(tmp_path, folder, capsys):
  root = _vizwiz(tmp_path, _QUESTION, folder=folder)
  assert read_vizwiz(root, 'val') == [
      Example(f'{root}/val/VizWiz_val_00000000.jpg', 'Can you tell me what this is?',
              ('unanswerable',) * 7 + ('a can',) * 3, 'VizWiz_val_00000000.jpg', 'unanswerable')]
  assert check.main([root, '--source', 'vizwiz']) == 0
  assert 'val: 1 examples, 1 pictures' in capsys.readouterr().out


def test_empty_texts_are_left_out_and_listed(tmp_path):
  answers = [{'answer': ''}, {'answer': 'a can'}, {'answer': 5}]
  root = _vizwiz(tmp_path, _QUESTION | {'answers': answers},
                 _QUESTION | {'image': 'VizWiz_val_00000001.jpg', 'question': ' '})
  [example] = source = read_vizwiz(root, 'val')
  assert example.answers == ('a can', '5')
  assert [line.split("jpg': ")[1] for line in source.faults] == [
      'has an empty answer, left out', 'has an empty question, left out']


def test_test_has_no_answers(tmp_path):
  question = {key: _QUESTION[key] for key in ('image', 'question')}
  [example] = read_vizwiz(_vizwiz(tmp_path, question, split='test'), 'test')
  assert example.answers == () and example.question_type == ''


@pytest.mark.parametrize('questions, said', [
    ([_QUESTION, _QUESTION], r"records 0 and 1 .* image 'VizWiz_val_00000000.jpg'"),
    ([_QUESTION | {'image': 'a.jpg'}], r'1 of 1 pictures are not in .*\(val\), such as a.jpg'),
    ([_QUESTION | {'answers': ['a can']}], "answers 1 is 'a can', wanted an object with 'answer'"),
    ([_QUESTION | {'answer_type': 3}], 'answer_type is 3, wanted text'),
])
def test_mistakes_stop_in_one_line(tmp_path, questions, said):
  root = _vizwiz(tmp_path, *questions)
  with pytest.raises(UserError, match=said):
    read_vizwiz(root, 'val')
  with pytest.raises(UserError, match='Annotations/train.json: no such file.*annotations/train.j'):
    read_vizwiz(root, 'train')
