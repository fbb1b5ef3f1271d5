"""OK-VQA as distributed."""

import published
import pytest

from xmodal.data import check
from xmodal.data.example import Example
from xmodal.data.sources.okvqa import read_okvqa
from xmodal.errors import UserError


def _okvqa(root, **annotation):
  answers = [{'answer_id': n, 'raw_answer': 'Racing', 'answer_confidence': 'yes',
              'answer': 'race'} for n in range(1, 11)]
  return published.write(root, {
      'OpenEnded_mscoco_val2014_questions.json': {'questions': [
          {'image_id': 9, 'question': 'What sport?', 'question_id': 95}]},
      'mscoco_val2014_annotations.json': {'annotations': [
          {'image_id': 9, 'answer_type': 'other', 'question_type': 'four', 'question_id': 95,
           'answers': answers, 'confidence': 3} | annotation]},
      'val2014/COCO_val2014_000000000009.jpg': (48, 32)})


def test_ten_answers_and_the_topic_are_read(tmp_path, capsys):
  root = _okvqa(tmp_path)
  assert read_okvqa(root, 'val') == [
      Example(f'{root}/val2014/COCO_val2014_000000000009.jpg', 'What sport?', ('race',) * 10, 95,
              'Sports and Recreation')]
  assert check.main([root, '--source', 'okvqa']) == 0
  out = capsys.readouterr().out
  assert 'train: not there\nval: 1 examples' in out and 'test: not there' in out


def test_mistakes_stop_in_one_line(tmp_path):
  root = _okvqa(tmp_path, question_type=4)
  with pytest.raises(UserError, match='question_type is 4, wanted text'):
    read_okvqa(root, 'val')
  with pytest.raises(UserError, match="OK-VQA has no split 'test', wanted one of train, val"):
    read_okvqa(root, 'test')
  with pytest.raises(UserError, match='OpenEnded_mscoco_train2014_questions.json: no such file'):
    read_okvqa(root, 'train')
