"""Scores of a model with non-finite outputs: none may look good."""

import json
import math

import numpy as np
import pytest
import torch

from xmodal.data.example import Example, Object
from xmodal.data.tokenizer import train_tokenizer
from xmodal.metrics import detection, regression, retrieval
from xmodal.tasks.objects import Objects
from xmodal.tasks.vqa import VQA
from xmodal.train.scoring import write_predictions

BROKEN = [math.nan, math.inf, -math.inf]
EXAMPLES = [Example(np.zeros((60, 60, 3), np.uint8), image_id=i, objects=(
    Object('cat', (5, 5, 20, 20)), Object('cat', (30, 30, 10, 10)))) for i in range(3)]


@pytest.mark.parametrize('value', BROKEN)
def test_retrieval_ranks_the_truth_last(value):
  gallery = retrieval.make_gallery(range(6), [(c,) for c in 'abcdef'])
  broken = np.full((6, 4), value, np.float32)
  ranking = retrieval.rank(broken, broken, gallery.right_captions, best=3)
  assert (ranking.ranks == 6).all()
  scores = retrieval.recall_scores(ranking.ranks, [1] * 6, 6)
  assert scores['recall_at_1'] == scores['recall_at_5'] == 0


@pytest.mark.parametrize('value', BROKEN)
def test_retrieval_of_a_few_broken_vectors_leaves_the_others(value):
  right = np.eye(8, dtype=np.float32)
  queries, candidates = right.copy(), right.copy()
  queries[0, 3], candidates[5, 2] = value, value
  ranks = retrieval.rank(queries, candidates, [np.array([i]) for i in range(8)]).ranks
  assert ranks.tolist() == [8, 1, 1, 1, 1, 8, 1, 1]


@pytest.mark.parametrize('value', BROKEN)
@pytest.mark.parametrize('box, score', [(True, False), (False, True), (True, True)])
def test_detection_finds_nothing(value, box, score):
  """pycocotools by itself gives mAP 1 for boxes of NaN."""
  found = [detection.DetectedBox('cat', (value,) * 4 if box else (5, 5, 20, 20),
                                 value if score else 0.9)]
  instances, results = detection.coco_files(EXAMPLES, [found] * 3, {'cat': 1})
  scores = detection.coco_scores(instances, results)
  assert scores and set(scores.values()) == {0.0}
  assert detection.referring_accuracy([(value,) * 4], [(5, 5, 20, 20)]) == [0]


@pytest.mark.parametrize('value', BROKEN)
def test_regression_is_never_right(value):
  scores = regression.regression_scores([value, value, 3.0], [1.0, 2.0, 3.0])
  assert scores['within_10%'] == scores['within_0.5'] == pytest.approx(1 / 3)
  assert not scores['MAE'] < math.inf and not scores['RMSE'] < math.inf
  assert not scores['R2'] > -math.inf


def test_vqa_does_not_score_as_the_commonest_answer():
  """The argmax of NaN logits is the first index, in PyTorch as in JAX."""
  task = VQA(train_tokenizer(['yes no'], 30), ('yes', 'no'), question_length=4, answer_length=4)
  probability, index = torch.full((3, 2), math.nan).softmax(-1).topk(2)
  assert index[:, 0].tolist() == [0, 0, 0]
  predictions = task.decode({'top_index': index.numpy(), 'top_probability': probability.numpy()})
  scores = task.score([Example('', question='is it?', answers=('yes',))] * 3, predictions)
  assert scores['accuracy'] == scores['label_accuracy'] == scores['f1_macro'] == 0


def test_objects_names_nothing():
  task = Objects(train_tokenizer(['cat'], 30), ['cat', 'dog'], max_objects=3)
  predictions = task.decode({'present': np.full((3, 2), math.nan, np.float32)})
  scores = task.score(EXAMPLES, predictions)
  assert scores['f1'] == scores['precision'] == scores['recall'] == 0


@pytest.mark.parametrize('value', BROKEN)
def test_files_of_a_broken_model_are_json(value, tmp_path):
  """RFC 8259 has no NaN: jq, pandas and JavaScript refuse a file with one."""
  task = VQA(train_tokenizer(['yes no'], 30), ('yes', 'no'), question_length=4, answer_length=4)
  task.record = lambda example, prediction: {'score': prediction, 'both': [0.5, (prediction,)]}
  write_predictions(str(tmp_path / 'p.jsonl'), task, [7], EXAMPLES[:1], [value])

  def refuse(name):
    raise AssertionError(name)

  line = json.loads((tmp_path / 'p.jsonl').read_text(), parse_constant=refuse)
  assert line == {'record': 7, 'score': None, 'both': [0.5, [None]]}
