"""Object names at image tokens: targets against a plain loop, the loss against PyTorch."""

import jax
import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer
import torch

from xmodal.data.example import Example, Object
from xmodal.data.pictures.augmentation import Placement
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.tasks.objects import NamedObjects, Objects, make_name_list, token_targets

IMAGE = np.zeros((40, 80, 3), np.uint8)
NAMES = ('red circle', 'blue square', 'cat')


@pytest.fixture(scope='module')
def objects():
  return Objects(train_tokenizer(NAMES, 100), NAMES, max_objects=4)


def test_targets_equal_a_plain_loop():
  rng = np.random.default_rng(0)
  boxes = np.sort(rng.random((5, 6, 2, 2)), axis=2).reshape(5, 6, 4).astype(np.float32)
  boxes[0, 0] = [1.0, 1.0, 1.0, 1.0]  # at the very edge: the last token
  boxes[0, 1] = [0.0, 0.0, 0.0, 0.0]
  names = rng.integers(-1, 3, (5, 6)).astype(np.int32)
  rows, columns = 3, 5
  expected = np.zeros((5, rows, columns, 3), np.float32)
  for b in range(5):
    for m in range(6):
      if names[b, m] >= 0:
        x0, y0, x1, y1 = boxes[b, m]
        row = min(int((y0 + y1) / 2 * rows), rows - 1)
        column = min(int((x0 + x1) / 2 * columns), columns - 1)
        expected[b, row, column, names[b, m]] = 1
  np.testing.assert_array_equal(token_targets(boxes, names, (rows, columns), 3), expected)


def test_two_alike_objects_at_one_token_count_once():
  boxes = np.tile(np.float32([0.1, 0.1, 0.2, 0.2]), (1, 2, 1))
  assert token_targets(boxes, np.zeros((1, 2), np.int32), (2, 2), 1).max() == 1


def test_an_object_is_found_at_the_token_where_it_lies(objects):
  example = Example(IMAGE, objects=(Object('blue square', (60, 0, 20, 20)),))
  encoded = objects.encode(example, Placement(80, 40))
  targets = np.asarray(token_targets(encoded['boxes'][None], encoded['names'][None], (2, 4), 3))
  assert np.argwhere(targets).tolist() == [[0, 0, 3, 1]]
  mirrored = objects.encode(example, Placement(80, 40, mirrored=True))
  targets = np.asarray(token_targets(mirrored['boxes'][None], mirrored['names'][None], (2, 4), 3))
  assert np.argwhere(targets).tolist() == [[0, 0, 0, 1]]


def test_the_loss_equals_torch(objects):
  example = Example(IMAGE, objects=(Object('cat', (0, 0, 10, 10)), Object('dog', (9, 9, 9, 9))))
  batch = jax.tree.map(lambda x: np.stack([x]), objects.encode(example, Placement(80, 40)))
  logits = np.random.default_rng(0).normal(size=(1, 2, 4, 3)).astype(np.float32)
  targets = np.zeros_like(logits)
  targets[0, 0, 0, 2] = 1
  theirs = torch.nn.functional.binary_cross_entropy_with_logits(
      torch.tensor(logits), torch.tensor(targets), reduction='none').sum(-1).mean()
  np.testing.assert_allclose(objects.losses(logits, batch)['names'], [theirs], rtol=1e-5)


def test_names_left_out_of_a_step_teach_nothing(objects):
  example = Example(IMAGE, objects=(Object('cat', (0, 0, 10, 10)),))
  batch = jax.tree.map(lambda x: np.stack([x]), objects.encode(example, Placement(80, 40)))
  few = Objects(train_tokenizer(NAMES, 100), NAMES, max_objects=4, sampled_names=2)
  asked = few.sampled_vocabulary(batch, jax.random.key(0))
  assert asked.counts[2] and asked.counts.sum() == 2
  logits = np.random.default_rng(0).normal(size=(1, 2, 4, 3)).astype(np.float32)
  targets = np.zeros_like(logits)
  targets[0, 0, 0, 2] = 1
  counts = np.asarray(asked.counts)
  theirs = torch.nn.functional.binary_cross_entropy_with_logits(
      torch.tensor(logits[..., counts]), torch.tensor(targets[..., counts]),
      reduction='none').sum(-1).mean()
  np.testing.assert_allclose(
      few.losses(logits, batch | {'vocabulary': asked})['names'], [theirs], rtol=1e-5)


def test_nobody_looked_is_not_the_same_as_nothing_there(objects):
  nobody = objects.encode(Example(IMAGE), Placement(80, 40))
  nothing = objects.encode(Example(IMAGE, objects=()), Placement(80, 40))
  assert objects.weights(nobody)['names'] == 0
  assert objects.weights(nothing)['names'] == 1


def test_more_objects_than_the_limit_are_said(objects):
  crowd = Example(IMAGE, objects=(Object('cat', (0, 0, 1, 1)),) * 5)
  assert '1 of 1 pictures have more than 4 objects' in objects.survey([crowd])[0]
  assert (objects.encode(crowd, Placement(80, 40))['names'] == 2).all()
  assert objects.survey([Example(IMAGE, objects=())]) == []


def test_data_without_objects_is_a_mistake(objects):
  with pytest.raises(UserError, match="take 'objects' out of config.mixer.tasks"):
    objects.survey([Example(IMAGE)])
  with pytest.raises(UserError, match='none of 1 training examples has an object'):
    make_name_list([Example(IMAGE, objects=())], 5)


def test_the_commonest_names_are_kept():
  examples = [Example(IMAGE, objects=tuple(Object(n, (0, 0, 1, 1)) for n in names))
              for names in (('cat', 'dog', 'cat'), ('eel', 'dog'), ('cat',))]
  assert make_name_list(examples, 2) == ('cat', 'dog')


def test_predictions_are_the_likeliest_names(objects):
  present = np.array([[0.1, 0.9, 0.6][:len(objects.names)]])
  (found,) = objects.decode({'present': present})
  assert [name for name, _ in found.names] == [objects.names[i] for i in (1, 2, 0)]
  assert objects.describe(found).splitlines()[0] == f'  90.0%  {objects.names[1]}'
  example = Example(IMAGE, objects=(Object(objects.names[1], (0, 0, 1, 1)),))
  assert objects.draw(example, np.zeros((8, 8, 3), np.uint8), found).height > 100
  line = objects.record(example, found)
  assert line['objects'] == [objects.names[1]] and line['names'][0]['probability'] == 0.9
  assert objects.record(Example(IMAGE), found) is None


def test_scores_of_names_equal_sklearn(objects):
  truths = [('cat', 'cat'), ('red circle', 'blue square'), (), ('dog',), None]
  said = [{'cat': 0.9}, {'red circle': 0.5, 'cat': 0.7}, {'cat': 0.49}, {'cat': 0.8}, {'cat': 1.0}]
  examples = [Example(IMAGE, objects=None if names is None else tuple(
      Object(name, (0, 0, 9, 9)) for name in names)) for names in truths]
  scores = objects.score(examples, [NamedObjects(tuple(chances.items())) for chances in said])
  binary = MultiLabelBinarizer(classes=[*NAMES, 'dog'])
  expected = precision_recall_fscore_support(
      binary.fit_transform(truths[:4]),
      binary.transform([[name for name, p in chances.items() if p >= 0.5] for chances in said[:4]]),
      average='micro')
  assert scores == pytest.approx(
      dict(zip(('precision', 'recall', 'f1'), expected[:3])) | {'examples': 4})
  assert objects.score([Example(IMAGE)], [NamedObjects(())]) == {}
  nothing_there = objects.score([Example(IMAGE, objects=())],
                                [NamedObjects((('red cross', .9),))])
  assert nothing_there == {'examples': 1} and objects.headline(nothing_there) == ''
