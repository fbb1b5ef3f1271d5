"""The detection task: what it makes of examples and of the head's numbers, and what it is asked."""

import jax
import numpy as np
import pytest

import tiny
from xmodal.data.example import Example, Object
from xmodal.data.placement import Placement
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.metrics.detection import Found
from xmodal.sharding.mesh import make_mesh
from xmodal.sharding.rules import shard_tree
from xmodal.tasks.detection import Detection, Prediction
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
      'meant_box': encoded['boxes'][:1], 'meant_score': np.float32([0.7])})
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
  # Nobody looked: nothing is learned. Nothing is there: that there is nothing.
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
  asked, examples = task.ask('a.jpg', ' grey  wolf. dog;the cat left of the dog? ')
  assert asked.names == ('grey wolf', 'dog')
  assert [e.expression.name for e in examples] == ['the cat left of the dog']
  predictions = [Prediction((Found('dog', (0, 0, 9, 9), 0.9), Found('dog', (5, 0, 9, 9), 0.01)),
                            (Found('', (1, 2, 3, 4), 0.5),))]
  assert task.describe(task.join(examples, predictions)) == (
      '[{"name": "dog", "score": 0.9, "box": [0, 0, 9, 9]}, '
      '{"name": "the cat left of the dog", "score": 0.5, "box": [1, 2, 3, 4]}]')
  asked, examples = task.ask('a.jpg', 'dog')
  assert asked.names == ('dog',) and examples[0].expression is None
  assert task.join(examples, predictions).meant == ()
  with pytest.raises(UserError, match='names nothing'):
    task.ask('a.jpg', ' . ')


def test_a_model_that_read_no_expressions_says_so(tokenizer):
  with pytest.raises(UserError, match="'the dog' means one thing"):
    make(tokenizer, [Example(IMAGE, objects=(DOG,))]).ask('a.jpg', 'cat. the dog.')


def test_names_that_training_did_not_have_are_scored_apart(task):
  wolf = Object('grey wolf', (50, 5, 20, 20))
  examples = [Example(IMAGE, objects=(CAT, DOG, wolf), expression=CAT)]
  asked = task.asked_of(examples)
  assert set(asked.names) == {'cat', 'dog', 'grey wolf'}
  assert len(set(asked.category_ids.values())) == 3
  predictions = [Prediction((Found('cat', CAT.box, 0.9), Found('dog', DOG.box, 0.8),
                             Found('grey wolf', (70, 5, 20, 20), 0.9)), (Found('', CAT.box, 0.9),))]
  scores = asked.score(examples, predictions)
  assert scores['mAP_seen'] == pytest.approx(1) and scores['mAP_unseen'] == 0
  assert scores['mAP'] == pytest.approx(2 / 3) and scores['referring'] == 1
  assert 'grey wolf' in asked.table(scores) and 'never trained on' in asked.table(scores)
  assert 'mAP 66.7%' in asked.headline(scores)


@pytest.mark.parametrize('queries', [0, 7])
def test_parameters_do_not_hang_on_the_names(task, tokenizer, queries):
  config = tiny.changed(detection__queries=queries)
  task = Detection(config.detection, tokenizer, task._learned)
  shapes = []
  for asked in (task, task.asking({'cat': 1}), task.asking({f'n{i}': i for i in range(20)})):
    model = build.make_model(build.settle(config, {}), tokenizer, {'detection': asked})
    encoded = asked.encode(Example(IMAGE, objects=(CAT,)), Placement(80, 40))
    batch = {'image': np.zeros((2, 32, 32, 3), np.uint8),
             'detection': jax.tree.map(lambda x: np.stack([x, x]), encoded)}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True))
    shapes.append(jax.tree.map(lambda x: x.shape, variables))
    shard_tree(variables, make_mesh(-1, 1, 1))  # a KeyError if no rule names a parameter
    found = jax.eval_shape(lambda v: model.apply(v, batch, deterministic=True), variables)
    assert found['detection']['names'].logits.shape == (2, queries or 16, len(asked.names))
  assert shapes[0] == shapes[1] == shapes[2]
