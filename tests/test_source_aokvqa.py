"""A-OKVQA as distributed."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.sources.aokvqa import read_aokvqa
from xmodal.errors import UserError

_QUESTION = {
    'split': 'train', 'image_id': 299207, 'question_id': '22MexNkBPpdZGX6sxbxVBH',
    'question': 'What is the man by the bags awaiting?',
    'choices': ['skateboarder', 'train', 'delivery', 'cab'], 'correct_choice_idx': 3,
    'direct_answers': ['ride'] * 4 + ['bus'] * 3 + ['taxi'] * 3, 'difficult_direct_answer': False,
    'rationales': ['A train would not be on the street.', 'He has bags.', 'He waits.']}


def _aokvqa(root, *questions, split='train'):
  return published.write(root, {f'aokvqa_v1p0_{split}.json': list(questions),
                                f'{split}2017/000000299207.jpg': (60, 40)})


def test_direct_answers_and_a_reason_are_read(tmp_path, capsys):
  root = _aokvqa(tmp_path, _QUESTION,
                 _QUESTION | {'question_id': 'b', 'difficult_direct_answer': True})
  first, second = read_aokvqa(root, 'train')
  assert first == Example(
      f'{root}/train2017/000000299207.jpg', _QUESTION['question'],
      tuple(_QUESTION['direct_answers']), '22MexNkBPpdZGX6sxbxVBH', 'direct',
      reason='A train would not be on the street.')
  assert second.question_type == 'difficult'
  assert check.main([root, '--source', 'aokvqa']) == 0
  assert 'train: 2 examples, 1 pictures' in capsys.readouterr().out


def test_the_choices_follow_the_question(tmp_path):
  [example] = read_aokvqa(_aokvqa(tmp_path, _QUESTION), 'train', multiple_choice=True)
  assert example.question.endswith('awaiting? skateboarder, train, delivery, cab')
  assert example.answers == ('cab',) and example.question_type == 'choice'


def test_test_has_no_answers(tmp_path):
  question = {key: value for key, value in _QUESTION.items()
              if key not in ('direct_answers', 'rationales', 'correct_choice_idx')}
  root = _aokvqa(tmp_path, question, split='test')
  for multiple_choice in (False, True):
    [example] = read_aokvqa(root, 'test', multiple_choice)
    assert example.answers == () and example.reason == ''


@pytest.mark.parametrize('change, said', [
    ({'correct_choice_idx': 4}, 'correct_choice_idx is 4, wanted one of 4 choices'),
    ({'direct_answers': 'cab'}, "direct_answers is 'cab', wanted a list"),
    ({'image_id': '299207'}, "image_id is '299207', wanted a whole number"),
    ({'image_id': 7}, '1 of 1 pictures are not in .*train2017/000000000007.jpg'),
    ({'question': None}, 'question is None, wanted text'),
])
def test_mistakes_stop_in_one_line(tmp_path, change, said):
  root = _aokvqa(tmp_path, _QUESTION | change)
  with pytest.raises(UserError, match=said):
    read_aokvqa(root, 'train', multiple_choice=True)
  with pytest.raises(UserError, match='aokvqa_v1p0_val.json: no such file'):
    read_aokvqa(root, 'val')
