"""The regression task: scenes, scores, features, and a whole run."""

import collections
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import stats
import sklearn.metrics
import tiny
import torch

import xmodal
from xmodal import predict
from xmodal.data.example import Example
from xmodal.data.open import open_source
from xmodal.data.pictures.augmentation import Augmentation
from xmodal.data.pictures.placement import Placement
from xmodal.data.scenes.numbers import Numbers
from xmodal.data.texts import number_text
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.metrics.regression import regression_scores, scores_by_group
from xmodal.tasks import writing
from xmodal.tasks.regression import Number, Regression

IMAGE = np.zeros((4, 4, 3), np.uint8)
WORDS = ('how wide is the red thing?', '10', '2.5', '-3', '1024')


# The scenes


@pytest.fixture(scope='module')
def scenes():
  source = Numbers('train', size=3000, image_size=64)
  return [source[i] for i in range(len(source))]


def named(example, phrase):
  """Boxes of the objects that a phrase in a question names."""
  words = set(phrase.replace('crosses', 'cross').split()) - {'object', 'objects'}
  words = {word.removesuffix('s') if word != 'cross' else word for word in words}
  return [o.box for o in example.objects if words <= set(o.name.split())]


def answer(example):
  """The answer of a question from the boxes, by an independent evaluator of its English."""
  question = example.question.lower().rstrip('?')
  if example.question_type == 'count':
    phrase = re.search(r'how many (.*?) (?:are there|do you see)|number of (.*)', question)
    return len(named(example, next(filter(None, phrase.groups()))))
  phrases = re.findall(r'the ((?!width|distance)[a-z ]+?)(?= from| and| have|$)', question)
  boxes = [named(example, re.sub('^.*of the ', '', phrase)) for phrase in phrases]
  assert all(len(found) == 1 for found in boxes), question
  if example.question_type == 'width':
    (((_, _, width, _),),) = boxes
    return 100 * width / 64
  ((one,), (other,)) = boxes
  middles = [(x + w / 2, y + h / 2) for x, y, w, h in (one, other)]
  return 100 * math.dist(*middles) / 64


def test_every_number_is_what_the_boxes_say(scenes):
  for example in scenes:
    assert example.number == pytest.approx(answer(example), abs=0.051), example.question


def test_families_and_counts_are_equally_frequent(scenes):
  families = collections.Counter(e.question_type for e in scenes)
  assert set(families) == {'count', 'width', 'distance'}
  assert stats.chisquare(list(families.values())).pvalue > 1e-3
  counts = collections.Counter(e.number for e in scenes if e.question_type == 'count')
  assert set(counts) == set(range(6))
  assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_words_say_nothing_about_the_number(scenes):
  for family in ('count', 'width', 'distance'):
    of_family = [e for e in scenes if e.question_type == family]
    for words in (2, 4):  # 'how far', 'what is the width'
      groups = collections.defaultdict(list)
      for e in of_family:
        groups[tuple(e.question.split()[:words])].append(e.number)
      assert stats.kruskal(*groups.values()).pvalue > 1e-3
    by_word = [[e.number for e in of_family if word in e.question] for word in ('red', 'circle')]
    assert stats.kruskal(*by_word, [e.number for e in of_family]).pvalue > 1e-3


def test_a_record_is_the_same_at_any_size_and_in_no_other_split():
  train, again, large = (Numbers('train', size=20, image_size=side) for side in (48, 48, 96))
  val = Numbers('val', size=20, image_size=48)
  for i in range(20):
    np.testing.assert_array_equal(train[i].image, again[i].image)
    assert train[i].number == large[i].number and train[i].question == large[i].question
    assert train.scene(i) != val.scene(i)


def test_a_number_may_measure_the_picture_so_it_is_not_zoomed():
  augmentation = Augmentation(zoom=0.5, crop=0.5)
  for number in (0.0, 12.5):
    plan = augmentation.draw(Example(IMAGE, question='how long?', number=number),
                             np.random.default_rng(0))
    assert plan.scale == 1 and plan.window == (0, 0, 1, 1)


# The scores


@pytest.mark.parametrize('seed', range(3))
def test_scores_are_those_of_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  truths = rng.normal(size=50) * 10
  predictions = truths + rng.normal(size=50)
  scores = regression_scores(predictions, truths)
  assert scores['MAE'] == pytest.approx(sklearn.metrics.mean_absolute_error(truths, predictions))
  assert scores['RMSE'] == pytest.approx(
      sklearn.metrics.root_mean_squared_error(truths, predictions))
  assert scores['R2'] == pytest.approx(sklearn.metrics.r2_score(truths, predictions))
  constant = np.full(50, truths.mean())
  assert scores['constant_MAE'] == pytest.approx(
      sklearn.metrics.mean_absolute_error(truths, constant))


def test_shares_and_groups_by_hand():
  scores = regression_scores([10.9, 5.5, 0.4, -9.5], [10, 5, 0, -10])
  assert scores['within_10%'] == 0.75 and scores['within_0.5'] == 0.75
  groups = scores_by_group([1, 2, 9], [1, 3, 9], ['b', 'b', 'a'])
  assert list(groups) == ['a', 'b'] and groups['b']['MAE'] == 0.5 and groups['b']['examples'] == 2
  assert 'R2' not in groups['a']  # a single target has no variance
  with pytest.raises(ValueError, match='at least one'):
    regression_scores([], [])


# The task


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(WORDS, 120)


def asked(number=None, question=WORDS[0], **fields):
  return Example(IMAGE, question=question, number=number, **fields)


def make(tokenizer, numbers, **values):
  config = tiny.changed(**{'regression__question_length': 8, **values})
  return Regression.from_data(config, tokenizer, [asked(n) for n in numbers])


def features(task, *examples):
  rows = [task.encode(e, Placement(4, 4)) for e in examples]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def test_losses_equal_torch(tokenizer):
  task = make(tokenizer, [10, 20, 30], regression__generation_weight=0.5)
  batch = features(task, asked(20.0), asked(10.0), asked(1024.0), asked())
  std = np.std([10, 20, 30])
  np.testing.assert_allclose(batch['number'], [0, -10 / std, 1004 / std, 0], rtol=1e-6)
  rng = np.random.default_rng(0)
  reg = np.float32([0.05, 1.0, -0.3, 0.2])
  gen = rng.normal(size=(4, 8, tokenizer.vocab_size), scale=3).astype(np.float32)
  losses = task.losses({'reg': jnp.asarray(reg), 'gen': jnp.asarray(gen)}, batch)
  theirs = torch.nn.functional.smooth_l1_loss(
      torch.tensor(reg), torch.tensor(batch['number']), reduction='none', beta=0.1)
  np.testing.assert_allclose(losses['reg'], theirs, rtol=1e-5)
  for i in range(3):
    written = torch.nn.functional.cross_entropy(
        torch.tensor(gen[i]), torch.tensor(batch['text'][i]).long(), ignore_index=tokenizer.pad_id)
    np.testing.assert_allclose(losses['gen'][i], written, rtol=1e-5)
  assert np.isfinite(losses['gen']).all() and task.loss_weights == {'reg': 1.0, 'gen': 0.5}
  for weights in task.weights(batch).values():
    np.testing.assert_array_equal(weights, [1, 1, 1, 0])
  error = task.progress({'reg': jnp.asarray(reg)}, batch)['MAE']
  np.testing.assert_allclose(error[:2], [0.05 * std, std + 10], rtol=1e-5)
  assert error[3] == 0


@pytest.mark.parametrize('number, text', [
    (0.0, '0'), (3.0, '3'), (2.5, '2.5'), (-3.0, '-3'), (0.123456, '0.1235'), (12345.6, '12350'),
    (1e-3, '0.001')])
def test_numbers_are_written_and_read(number, text):
  assert number_text(number) == text
  assert writing.read_number(text) == pytest.approx(number, rel=1e-3)


def test_what_is_no_number_is_not_read():
  assert writing.read_number('- 2 . 5') == -2.5  # as some tokenizers decode it
  assert [writing.read_number(text) for text in ('', 'two', 'nan', 'inf', '1.2.3')] == [None] * 5


def test_decoded_numbers_have_their_own_unit(tokenizer):
  task = make(tokenizer, [10, 30])
  arrays = {'number': np.float32([0, -1.5]), 'tokens': tokenizer.encode(['2.5', '-3'], 6),
            'log_probability': np.log([0.5, 1])}
  first, second = task.decode(arrays)
  assert (first.number, second.number) == (20, 5)
  assert first.written == ('2.5', pytest.approx(0.5)) and second.written[0] == '-3'
  assert task.describe(first).splitlines() == ['20', 'written: 2.5 (50.0%)']


def test_scores_by_type_and_of_what_is_written(tokenizer):
  task = make(tokenizer, [10, 30])
  examples = [asked(10.0, question_type='width'), asked(20.0, question_type='width'),
              asked(3.0, question_type='count'), asked()]
  predictions = [Number(11, ('10', 0.5)), Number(20, ('x', 0.5)), Number(3, ('5', 0.5)),
                 Number(0, ('0', 0.5))]
  scores = task.score(examples, predictions)
  assert scores['examples'] == 3 and scores['MAE'] == pytest.approx(1 / 3)
  assert scores['MAE/width'] == 0.5 and scores['constant_MAE/width'] == 5
  assert scores['written_share'] == pytest.approx(2 / 3) and scores['written_MAE'] == 1
  rows = task.table(scores).splitlines()
  assert [row.split()[0] for row in rows] == ['question', 'count', 'width', 'all', 'written:']
  assert '100.0% of 3 within 10%' in task.headline(scores)
  assert task.score(examples[3:], predictions[3:]) == {} and task.headline({}) == ''


def test_mistakes_are_said(tokenizer):
  with pytest.raises(UserError, match='none of 1 training examples has a number.*data.numbers'):
    make(tokenizer, [None])
  task = make(tokenizer, [5, 5])  # all equal: no division by 0
  assert task.encode(asked(6.0), Placement(4, 4))['number'] == 1
  with pytest.raises(UserError, match='none of 1 examples has "question" and "number"'):
    task.survey([asked(question='')])
  note, = task.survey([asked(1.0), asked(1.0, question=WORDS[0] * 3)])
  assert note.startswith('1 of 2 questions are longer than 8 tokens')
  with pytest.raises(UserError, match='--text is empty; regression wants'):
    task.query('a.jpg', ' ')
  with pytest.raises(UserError, match='config.data.crowded.*config.data.numbers'):
    open_source(tiny.changed(data__numbers=True, data__crowded=True), 'train', train=True)


# A whole run


def config():
  return tiny.changed(
      mixer__tasks=('regression',), mixer__weights=(1.0,), data__numbers=True, train__steps=4,
      train__eval_every=4, train__checkpoint_every=2)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, the task's scores in final.json)."""
  workdir = tmp_path_factory.mktemp('regression') / 'run'
  return workdir, tiny.train(workdir, config())['evaluation']['regression']


def test_scores_are_those_of_the_predictions_written(run):
  workdir, scores = run
  lines = [json.loads(x) for x in (workdir / 'predictions_regression_val.jsonl').open()]
  source = open_source(config(), 'val', train=False)
  assert [line['number'] for line in lines] == [source[i].number for i in range(20)]
  errors = [abs(line['predicted'] - line['number']) for line in lines]
  assert scores['MAE'] == pytest.approx(np.mean(errors), rel=1e-4)
  assert {'MAE/count', 'MAE/width', 'MAE/distance', 'written_share'} <= scores.keys()
  assert Image.open(workdir / 'samples' / 'regression_val_0000004.png').width > 1000
  learned = json.loads((workdir / 'assets' / 'regression' / 'numbers.json').read_text())
  train = open_source(config(), 'train', train=True)
  numbers = [train[i].number for i in range(len(train))]
  assert learned == {'mean': pytest.approx(np.mean(numbers)), 'std': pytest.approx(np.std(numbers))}


def test_a_stopped_run_goes_on_to_the_same_end(run, tmp_path):
  workdir = shutil.copytree(run[0], tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / '4')
  assert tiny.train(workdir, config())['evaluation']['regression'] == run[1]


def test_a_loaded_model_answers_with_numbers(run):
  model, source = xmodal.load(run[0]), Numbers('test', size=3, image_size=32)
  question = 'how many objects are there?'
  numbers = model([source[i].image for i in range(3)], question)
  for i, number in enumerate(numbers):
    assert isinstance(number, Number)
    assert number.number == pytest.approx(model(source[i].image, question).number, rel=1e-4)
  assert model.plain(numbers)[0].keys() == {'predicted', 'written'}
  with pytest.raises(UserError, match='^text is empty; regression wants'):
    model(source[0].image)


def test_predict_answers_with_a_number(run, tmp_path, capsys):
  Image.fromarray(Numbers('test', size=1, image_size=32)[0].image).save(tmp_path / 'a.png')
  arguments = ['--checkpoint', str(run[0]), '--image', str(tmp_path / 'a.png')]
  assert predict.main([*arguments, '--text', 'how many objects are there?']) == 0
  number, written = capsys.readouterr().out.splitlines()
  assert math.isfinite(float(number)) and written.startswith('written: ')
  assert predict.main(arguments) == 2
  assert '--text is empty' in capsys.readouterr().err
