"""The detection task: features, decoding of the head's outputs, and queries."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from xmodal.data.example import Example, Object
from xmodal.data.faults import Examples
from xmodal.data.pictures.placement import Placement
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.metrics.detection import DetectedBox
from xmodal.sharding.mesh import make_mesh
from xmodal.sharding.rules import shard_tree
from xmodal.tasks.detection.task import Detection, Detections
from xmodal.train import build

IMAGE = np.zeros((40, 80, 3), np.uint8)
CAT, DOG = Object('cat', (10, 20, 30, 10)), Object('dog', (0, 0, 40, 40))
TEXTS = ('cat', 'dog', 'grey wolf', 'the cat left of the dog')


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(TEXTS, 60)


def make(tokenizer, examples, **values):
  return Detection.from_data(tiny.changed(**values), tokenizer, examples)


@pytest.fixture(scope='module')
def task(tokenizer):
  return make(tokenizer, [
      Example(IMAGE, objects=(CAT, DOG, CAT), expression=Object(TEXTS[3], CAT.box)),
      Example(IMAGE, objects=())])


def test_targets_are_in_the_input_and_come_back_in_pixels(task):
  placement = Placement.of_part((40, 80), (0, 0, 80, 40), (0, 0, 32, 16), (32, 32))
  encoded = task.encode(Example(IMAGE, objects=(CAT,), expression=CAT), placement)
  np.testing.assert_allclose(encoded['boxes'][0], [10 / 80, 20 / 80, 40 / 80, 30 / 80], atol=1e-6)
  np.testing.assert_allclose(encoded['expression']['box'], encoded['boxes'][:1])
  assert encoded['names'].tolist() == [task.names.index('cat'), -1, -1]
  (prediction,) = task.decode({
      'placement': encoded['placement'][None], 'boxes': encoded['boxes'][None],
      'name': encoded['names'][None], 'score': np.float32([[0.9, 0.1, 0.0]]),
      'expression_box': encoded['boxes'][:1], 'expression_score': np.float32([0.7])})
  assert prediction.found[0].name == 'cat'
  np.testing.assert_allclose(prediction.found[0].box, CAT.box, atol=1e-4)
  np.testing.assert_allclose(prediction.meant[0].box, CAT.box, atol=1e-4)


def test_what_does_not_count_is_no_target(task):
  things = (Object('cat', (1, 1, 5, 5), ignore=True), Object('wolf', (1, 1, 5, 5)), DOG)
  encoded = task.encode(Example(IMAGE, objects=things), Placement(80, 40))
  assert encoded['names'].tolist() == [task.names.index('dog'), -1, -1]
  assert encoded['expression']['weight'] == 0
  weights = {objects: {term: float(w) for term, w in task.weights(task.encode(
      Example(IMAGE, objects=objects), Placement(80, 40))).items()}
      for objects in (None, (), (DOG, DOG))}
  # Not annotated: no loss. Annotated as empty: "no object" is learned.
  assert set(weights[None].values()) == {0}
  assert weights[()]['names_scores'] == 1 and weights[()]['names_boxes'] == 0
  assert weights[(DOG, DOG)]['names_scores'] == weights[(DOG, DOG)]['names_boxes'] == 2


def test_more_objects_than_places_are_said(tokenizer):
  crowd = Example(IMAGE, objects=(DOG,) * 7)
  task = make(tokenizer, [crowd], detection__max_objects=5)
  assert '1 of 1 pictures have more than 5 objects (up to 7); training leaves out 2' in (
      task.survey([crowd])[0])
  assert (task.encode(crowd, Placement(80, 40))['names'] == 0).all()


def test_fewer_queries_than_places_end_before_training(tokenizer):
  crowd = Example(IMAGE, objects=(DOG,) * 7)
  with pytest.raises(UserError, match='config.detection.queries=3: .* 7 objects'):
    make(tokenizer, [crowd], detection__queries=3)


def test_a_text_asks_for_names_or_for_one_thing(task):
  asked, examples = task.query('a.jpg', ' grey  wolf. dog;the cat left of the dog? ')
  assert asked.names == ('grey wolf', 'dog')
  assert [e.expression.name for e in examples] == ['the cat left of the dog']
  predictions = [Detections((DetectedBox('dog', (0, 0, 9, 9), 0.9),
                             DetectedBox('dog', (5, 0, 9, 9), 0.01)),
                            (DetectedBox('', (1, 2, 3, 4), 0.5),))]
  assert task.describe(task.join(examples, predictions)) == (
      '[{"name": "dog", "score": 0.9, "box": [0, 0, 9, 9]}, '
      '{"name": "the cat left of the dog", "score": 0.5, "box": [1, 2, 3, 4]}]')
  asked, examples = task.query('a.jpg', 'dog')
  assert asked.names == ('dog',) and examples[0].expression is None
  assert task.join(examples, predictions).meant == ()
  with pytest.raises(UserError, match='names nothing'):
    task.query('a.jpg', ' . ')


def test_a_model_that_read_no_expressions_says_so(tokenizer):
  with pytest.raises(UserError, match="'the dog' means one thing"):
    make(tokenizer, [Example(IMAGE, objects=(DOG,))]).query('a.jpg', 'cat. the dog.')


def test_names_that_training_did_not_have_are_scored_apart(task):
  wolf = Object('grey wolf', (50, 5, 20, 20))
  examples = [Example(IMAGE, objects=(CAT, DOG, wolf), expression=CAT)]
  asked = task.for_split(examples)
  assert set(asked.names) == {'cat', 'dog', 'grey wolf'}
  assert len(set(asked.category_ids.values())) == 3
  predictions = [Detections((DetectedBox('cat', CAT.box, 0.9), DetectedBox('dog', DOG.box, 0.8),
                             DetectedBox('grey wolf', (70, 5, 20, 20), 0.9)),
                            (DetectedBox('', CAT.box, 0.9),))]
  scores = asked.score(examples, predictions)
  assert scores['mAP_seen'] == pytest.approx(1) and scores['mAP_unseen'] == 0
  assert scores['mAP'] == pytest.approx(2 / 3) and scores['referring'] == 1
  assert 'grey wolf' in asked.table(scores) and 'never trained on' in asked.table(scores)
  assert 'mAP 66.7%' in asked.headline(scores)


def _scored(task, examples):
  """The scores of exact predictions, and the lines printed about them."""
  asked = task.for_split(examples)
  scores = asked.score(examples, [Detections(tuple(
      DetectedBox(o.name, o.box, 0.9) for o in e.objects or ())) for e in examples])
  return scores, asked.headline(scores), asked.table(scores)


_WOLF = Object('grey wolf', (50, 5, 20, 20))


@pytest.mark.parametrize('objects, wanted', [
    ((CAT, _WOLF), {'mAP': 1, 'mAP_seen': 1, 'mAP_unseen': 1}),
    ((_WOLF,), {'mAP': 1, 'mAP_unseen': 1}),  # none of the names trained on
    ((CAT, dataclasses.replace(_WOLF, ignore=True)), {'mAP': 1, 'mAP_seen': 1}),
    ((dataclasses.replace(CAT, ignore=True), _WOLF), {'mAP': 1, 'mAP_unseen': 1}),
    ((dataclasses.replace(CAT, ignore=True),), {}),  # as crowds, or too hard to judge
    ((dataclasses.replace(_WOLF, ignore=True),), {}),
    ((), {})])
def test_scores_without_truth_are_missing(task, objects, wanted):
  scores, headline, table = _scored(task, [Example(IMAGE, objects=objects)])
  found = {key: score for key, score in scores.items() if key.startswith('mAP') and '5' not in key
           and key.split('_')[-1] not in ('small', 'medium', 'large')}
  assert found == pytest.approx(wanted) and scores['examples'] == 1
  assert ('mAP 100.0%' in headline) == ('all' in table) == bool(wanted)
  assert ('never trained on' in table) == ('mAP_unseen' in wanted)


def test_only_names_of_another_data_set_are_asked_for_where_it_shares_none(task):
  """Trained names would fill the hundred most probable boxes that COCO counts."""
  assert task.for_split([Example(IMAGE, objects=(_WOLF,))]).names == ('grey wolf',)
  assert set(task.for_split([Example(IMAGE, objects=(_WOLF, CAT))]).names) == {
      'cat', 'dog', 'grey wolf'}
  nobody_looked = Examples([Example(IMAGE)], (), {'grey wolf': 4, 'elk': 2})
  assert task.for_split(nobody_looked).category_ids == {'grey wolf': 4, 'elk': 2}
  assert task.for_split([Example(IMAGE)]).names == task.names


def test_each_split_has_its_own_numbers_in_its_files(task):
  val = Examples([Example(IMAGE, image_id=3, objects=(
      dataclasses.replace(CAT, category_id=0), dataclasses.replace(_WOLF, category_id=2)))],
                 (), {'cat': 0, 'eel': 1, 'grey wolf': 2})
  asked = task.for_split(val)
  found = [Detections(tuple(DetectedBox(name, CAT.box, 0.9)
                            for name in ('cat', 'dog', 'grey wolf')))]
  files = asked.files(val, found)
  assert {c['name']: c['id'] for c in files['instances']['categories']} == {
      'cat': 0, 'grey wolf': 2}
  # 'dog' is not a name of val, so its annotations have no id for it.
  assert [line['category_id'] for line in files['results']] == [0, 2]
  assert asked.score(val, found)['mAP_seen'] == pytest.approx(1)


def test_objects_that_are_all_to_be_ignored_are_said(task):
  crowd = [Example(IMAGE, objects=(dataclasses.replace(DOG, ignore=True),) * 2)]
  assert any('all 2 objects are to be ignored' in line for line in task.survey(crowd))
  assert not any('ignored' in line for line in task.survey([Example(IMAGE, objects=(DOG,))]))


@pytest.mark.parametrize('queries', [0, 7])
def test_parameters_do_not_hang_on_the_names(task, tokenizer, queries):
  config = tiny.changed(detection__queries=queries)
  task = Detection(config.detection, tokenizer, task._learned)
  shapes = []
  for asked in (task, task.with_names({'cat': 1}),
                task.with_names({f'n{i}': i for i in range(20)})):
    model = build.make_model(build.resolve(config, {}), tokenizer, {'detection': asked})
    encoded = asked.encode(Example(IMAGE, objects=(CAT,)), Placement(80, 40))
    batch = {'image': np.zeros((2, 32, 32, 3), np.uint8),
             'detection': jax.tree.map(lambda x: np.stack([x, x]), encoded)}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True))
    shapes.append(jax.tree.map(lambda x: x.shape, variables))
    shard_tree(variables, make_mesh(-1, 1, 1))  # an error if no rule matches a parameter
    found = jax.eval_shape(lambda v: model.apply(v, batch, deterministic=True), variables)
    assert found['detection']['names'].logits.shape == (2, queries or 16, len(asked.names))
  assert shapes[0] == shapes[1] == shapes[2]
