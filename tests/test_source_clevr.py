"""CLEVR as distributed."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.sources.clevr import read_clevr
from xmodal.errors import UserError


def _question(number, answer, *program, image=0, split='val', **more):
  return {'question_index': number, 'question_family_index': 12, 'image_index': image,
          'image_filename': f'CLEVR_{split}_{image:06}.png', 'split': split, 'answer': answer,
          'question': f'Question {number}?', 'program': [
              {'inputs': [i - 1] if i else [], 'function': name, 'value_inputs': []}
              for i, name in enumerate(program)], **more}


def _clevr(root, questions, split='val'):
  pictures = {f'images/{split}/CLEVR_{split}_{i:06}.png': (48, 32) for i in range(2)}
  return published.write(root, pictures | {
      f'questions/CLEVR_{split}_questions.json': {'info': {}, 'questions': questions}})


def test_questions_have_the_type_of_their_last_function(tmp_path, capsys):
  root = _clevr(tmp_path, [_question(0, 'no', 'scene', 'unique', 'exist'),
                           _question(1, '3', 'scene', 'count', image=1)])
  picture = f'{root}/images/val/CLEVR_val_00000'
  assert read_clevr(root, 'val') == [
      Example(f'{picture}0.png', 'Question 0?', ('no',), 0, 'exist'),
      Example(f'{picture}1.png', 'Question 1?', ('3',), 1, 'count')]
  assert check.main([root, '--source', 'clevr']) == 0
  assert 'train: not there\nval: 2 examples, 2 pictures' in capsys.readouterr().out


def test_test_has_neither_answers_nor_programs(tmp_path):
  question = {key: value for key, value in _question(0, '', split='test').items()
              if key not in ('answer', 'program', 'question_family_index')}
  [example] = read_clevr(_clevr(tmp_path, [question], 'test'), 'test')
  assert example.answers == () and example.question_type == ''


@pytest.mark.parametrize('questions, split, said', [
    ([], 'val', "wanted a list under 'questions'"),
    ([_question(0, 'no')], 'train', r'CLEVR_train_questions.json: no such file'),
    ([_question(0, 'no', 'exist')] * 2, 'val', r'records 0 and 1 .* question_index 0'),
    ([_question(0, 'no', 'exist', image=7)], 'val', r'1 of 1 pictures .*CLEVR_val_000007.png'),
    ([_question(0, 'no', 'exist', question=' ')], 'val', 'question is .*not empty'),
    ([_question(0, True, 'exist')], 'val', 'answer is True, wanted text or a number'),
    ([_question(0, 'no', 7)], 'val', r"program 1 has 'function' that is 7, wanted text"),
])
def test_mistakes_stop_in_one_line(tmp_path, questions, split, said):
  with pytest.raises(UserError, match=said):
    read_clevr(_clevr(tmp_path, questions), split)
