"""Boxes scored by hand through COCO's files on disk, and IoU, against pycocotools."""

import json

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pytest

from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples
from xmodal.metrics.detection import (
  DetectedBox,
  coco_files,
  coco_scores,
  iou,
  number_categories,
  referring_accuracy,
)

NAMES = {'cat': 17, 'red circle': 3, 'dog': 90, 'never there': 5}
SUMMARY = ('mAP', 'mAP50', 'mAP75', 'mAP_small', 'mAP_medium', 'mAP_large')


def random_data(seed, pictures=12):
  """Objects of all sizes, some ignored; boxes near them, elsewhere and duplicated; ties."""
  rng = np.random.default_rng(seed)
  names = [name for name in NAMES if name != 'never there']
  examples, predictions = [], []
  for number in range(pictures):
    objects, found = [], []
    for _ in range(rng.integers(0, 9)):
      size = np.exp(rng.uniform(np.log(8), np.log(300), 2))
      box = tuple(np.concatenate([rng.uniform(0, 640 - size), size]).tolist())
      name = str(rng.choice(names))
      objects.append(Object(name, box, ignore=bool(rng.random() < 0.2),
                            area=box[2] * box[3] * 0.7 if rng.random() < 0.3 else None))
      for _ in range(rng.integers(0, 4)):
        moved = np.array(box) + rng.normal(0, 0.1, 4) * (box[2:] * 2)
        found.append(DetectedBox(name if rng.random() < 0.8 else str(rng.choice(names)),
                           tuple(np.maximum(moved, 0.5)), round(float(rng.random()), 1)))
    # More boxes of one category in one picture than COCO counts.
    for _ in range(130 if number == 0 else rng.integers(0, 6)):
      found.append(DetectedBox('dog' if number == 0 else str(rng.choice(list(NAMES))),
                         tuple(rng.uniform(1, 200, 4)), round(float(rng.random()), 1)))
    examples.append(Example(f'pictures/{number}.jpg', objects=tuple(objects),
                            image_id=1000 - 7 * number))
    predictions.append([found[i] for i in rng.permutation(len(found))])
  return examples, predictions


def judge(folder, instances, results, categories=None):
  """The official way: two files, COCO, loadRes, COCOeval."""
  for name, content in (('instances', instances), ('results', results)):
    (folder / f'{name}.json').write_text(json.dumps(content, allow_nan=False))
  truth = COCO(str(folder / 'instances.json'))
  evaluation = COCOeval(truth, truth.loadRes(str(folder / 'results.json')), 'bbox')
  if categories is not None:
    evaluation.params.catIds = categories
  evaluation.evaluate()
  evaluation.accumulate()
  evaluation.summarize()
  return evaluation.stats


@pytest.mark.parametrize('seed', range(6))
def test_scores_are_those_of_the_official_way(seed, tmp_path):
  instances, results = coco_files(*random_data(seed), NAMES)
  scores = coco_scores(instances, results)
  stats = judge(tmp_path, instances, results)
  assert 0.05 < scores['mAP'] < 0.95
  assert [scores[key] for key in SUMMARY] == stats[:6].tolist()
  assert scores['recall100'] == stats[8]
  for name in ('cat', 'red circle', 'dog'):
    one = judge(tmp_path, instances, results, [NAMES[name]])
    assert (scores[f'AP/{name}'], scores[f'AP50/{name}']) == tuple(one[:2])
    # One category by itself, in any order.
    assert coco_scores(instances, results, [name])['mAP'] == one[0]
  assert 'AP/never there' not in scores


def test_scores_of_some_names(tmp_path):
  instances, results = coco_files(*random_data(7), NAMES)
  scores = coco_scores(instances, results, ['dog', 'never there', 'cat'])
  stats = judge(tmp_path, instances, results, [NAMES['dog'], NAMES['cat']])
  assert [scores[key] for key in SUMMARY] == stats[:6].tolist()
  assert {key for key in scores if '/' in key} == {'AP/cat', 'AP50/cat', 'AP/dog', 'AP50/dog'}
  assert coco_scores(instances, results, ['never there']) == {}
  assert coco_scores(instances, results, []) == {}


def test_scoring_changes_nothing_and_prints_nothing(capsys):
  files = coco_files(*random_data(8), NAMES)
  before = json.dumps(files)
  scores = coco_scores(*files)
  assert json.dumps(files) == before and coco_scores(*files) == scores
  assert capsys.readouterr() == ('', '')


def test_nothing_found_scores_zero():
  examples = [Example('a.jpg', objects=(Object('cat', (1, 1, 9, 9)),))]
  assert coco_scores(*coco_files(examples, [[]], NAMES)) == {
      'mAP': 0, 'mAP50': 0, 'mAP75': 0, 'mAP_small': 0, 'recall100': 0, 'AP/cat': 0, 'AP50/cat': 0}


@pytest.mark.parametrize('objects', [None, (), (Object('cat', (1, 1, 9, 9), ignore=True),)])
def test_no_truth_has_no_score(objects):
  found = [DetectedBox('cat', (1, 1, 9, 9), 0.5)]
  assert coco_scores(*coco_files([Example('a.jpg', objects=objects)], [found], NAMES)) == {}
  assert coco_scores(*coco_files([], [], NAMES)) == {}


def test_files_are_in_cocos_formats():
  examples = [
      Example('train/a.jpg', image_id=42, objects=(
          Object('cat', (1, 2, 3, 4)), Object('dog', (0, 0, 9.5, 2), ignore=True, area=7),
          Object('of no category', (0, 0, 1, 1)))),
      Example('train/b.jpg', image_id=43),
      Example(np.zeros((48, 64, 3), np.uint8), image_id=7, objects=())]
  predictions = [
      [DetectedBox('dog', tuple(np.array([0.123, 4.567, 8, 16.004], np.float32)), np.float32(0.1)),
       DetectedBox('of no category', (0, 0, 1, 1), 1.0)],
      [DetectedBox('cat', (0, 0, 1, 1), 0.9)], [DetectedBox('cat', (0, 0, 1, 1), 0.2)]]
  instances, results = coco_files(examples, predictions, {'cat': 17, 'dog': 18})
  assert instances == {
      'info': {},
      'images': [{'id': 42, 'file_name': 'a.jpg'}, {'id': 7, 'height': 48, 'width': 64}],
      'annotations': [
          {'id': 1, 'image_id': 42, 'category_id': 17, 'bbox': [1, 2, 3, 4], 'area': 12,
           'iscrowd': 0},
          {'id': 2, 'image_id': 42, 'category_id': 18, 'bbox': [0, 0, 9.5, 2], 'area': 7,
           'iscrowd': 1}],
      'categories': [{'id': 17, 'name': 'cat'}, {'id': 18, 'name': 'dog'}]}
  assert json.loads(json.dumps(results)) == [
      {'image_id': 42, 'category_id': 18, 'bbox': [0.12, 4.57, 8, 16],
       'score': float(np.float32(0.1))},
      {'image_id': 7, 'category_id': 17, 'bbox': [0, 0, 1, 1], 'score': 0.2}]
  with pytest.raises(ValueError, match='each of 3 examples, found 2'):
    coco_files(examples, predictions[:2], NAMES)


def test_results_without_truth_can_be_sent_away():
  examples = [Example('a.jpg', image_id=42), Example('b.jpg', image_id=5)]
  instances, results = coco_files(examples, [[], [DetectedBox('cat', (0, 0, 1, 1), 0.9)]], NAMES)
  assert [image['id'] for image in instances['images']] == [42, 5]
  assert [result['image_id'] for result in results] == [5]


@pytest.mark.parametrize('own, given', [
    ((9, 4, 7), [9, 4, 7]), (('b', 'a', 'c'), ['b', 'a', 'c']),
    ((9, None, 7), [0, 1, 2]),  # one has none
    ((9, 9, 7), [0, 1, 2]),  # twice: a picture is judged once
    ((9, 'a', 7), [0, 1, 2])])
def test_pictures_keep_their_numbers_if_they_can(own, given):
  examples = [Example('a.jpg', image_id=number, objects=(Object('cat', (0, 0, 50, 50)),))
              for number in own]
  instances, results = coco_files(
      examples, [[DetectedBox('cat', (0, 0, 50, 50), 0.9)] for _ in own], NAMES)
  assert [image['id'] for image in instances['images']] == given
  assert coco_scores(instances, results)['mAP'] == pytest.approx(1)


def test_categories_keep_their_numbers_if_they_can():
  def examples(*numbers):
    return [Example('a.jpg', objects=tuple(
        Object(name, (0, 0, 1, 1), category_id=number) for name, number in numbers)),
            Example('b.jpg')]
  own = (('dog', 18), ('cat', 17), ('dog', 18), ('cow', None))
  assert number_categories(['cat', 'dog'], examples(*own)) == {'cat': 17, 'dog': 18}
  # One without an id, two with the same id, ids of two types.
  assert number_categories(['cat', 'cow'], examples(*own)) == {'cat': 1, 'cow': 2}
  assert number_categories(['a', 'b'], examples(('a', 4), ('b', 4))) == {'a': 1, 'b': 2}
  assert number_categories(['a', 'b'], examples(('a', 4), ('b', 'x'))) == {'a': 1, 'b': 2}
  # Two ids of one name: the one with most objects. A name of another data set has none.
  twice = examples(('a', 4), ('b', 6), ('a', 5), ('a', 5))
  assert number_categories(['a', 'b'], twice) == {'a': 5, 'b': 6}
  assert number_categories(['cat', 'owl'], examples(*own)) == {'cat': 17, 'owl': None}


def test_numbers_of_another_split_are_kept_beside_new_ones():
  unnumbered = [Example('a.jpg', objects=tuple(
      Object(name, (0, 0, 1, 1)) for name in ('cat', 'owl')))]
  names = ['cat', 'dog', 'owl', 'emu']
  assert number_categories(names, unnumbered, {'cat': 17, 'dog': 90}) == {
      'cat': 17, 'dog': 90, 'owl': 91, 'emu': 92}
  assert number_categories(names[:3], unnumbered, {'cat': 'c', 'dog': 'd'}) == {
      'cat': 1, 'dog': 2, 'owl': 3}
  listed = Examples(unnumbered, (), {'cat': 0, 'owl': 1, 'never there': 2})
  assert number_categories(names[:3], listed, {'cat': 1, 'dog': 0}) == {
      'cat': 0, 'dog': None, 'owl': 1}


def test_iou_is_that_of_pycocotools():
  rng = np.random.default_rng(0)
  a, b = rng.uniform(0, 40, (2, 500, 4))
  b[:100] = a[:100] + rng.normal(0, 1, (100, 4)) ** 2
  wanted = np.array([mask.iou(p[None], q[None], [0])[0, 0] for p, q in zip(a, b)])
  assert (wanted == 0).any() and (wanted > 0.8).any()
  np.testing.assert_allclose(iou(a, b), wanted, atol=1e-12)
  np.testing.assert_allclose(iou(b, a), wanted, atol=1e-12)
  np.testing.assert_allclose(iou(a, a), 1)
  # It knows neither the origin nor the unit of the boxes.
  np.testing.assert_allclose(iou(a * 3 + (5, -9, 0, 0), b * 3 + (5, -9, 0, 0)), wanted, atol=1e-12)
  right = referring_accuracy(a, b)
  assert right == (wanted >= 0.5).astype(float).tolist() and 0 < sum(right) < 500


def test_iou_at_its_ends():
  box, inside, half, point = (2, 2, 4, 4), (3, 3, 1, 1), (2, 2, 4, 2), (3, 3, 0, 0)
  beside, corner = (6, 2, 4, 4), (6, 6, 4, 4)
  assert iou([box] * 5, [inside, half, point, beside, corner]).tolist() == [1 / 16, .5, 0, 0, 0]
  assert iou([point], [point]).tolist() == [0]
  assert referring_accuracy([box, box], [half, inside]) == [1, 0]
  assert referring_accuracy([box, box], [half, inside], 1 / 16) == [1, 1]
  assert referring_accuracy([], []) == []
  with pytest.raises(ValueError, match='found 1 and 2'):
    iou([box], [box, box])
