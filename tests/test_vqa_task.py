"""Visual question answering: targets, losses, answers and messages."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from xmodal.data.example import Example
from xmodal.data.pictures.augmentation import Placement
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.tasks.task import TASKS
from xmodal.tasks.vqa.answers import make_answer_list
from xmodal.tasks.vqa.task import MAX_TARGETS, VQA, Answer
from xmodal.train import build, plan

IMAGE = np.zeros((4, 4, 3), np.uint8)
ANSWERS = ('red', 'blue', 'two', 'dark green')
WORDS = ['is the thing red or blue or dark green?', 'two things', 'yes', 'no']


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(WORDS, 200)


@pytest.fixture(scope='module')
def vqa(tokenizer):
  return VQA(tokenizer, ANSWERS, question_length=8, answer_length=4, generation_weight=0.5)


def asked(*answers, question='is the thing red?', **fields):
  return Example(IMAGE, question=question, answers=answers, **fields)


def features(vqa, *examples):
  rows = [vqa.encode(e, Placement(4, 4)) for e in examples]
  return jax.tree.map(lambda *x: np.stack(x), *rows)


# Targets: the accuracy that each answer would get, worked out by hand, as shares


@pytest.mark.parametrize('answers, target', [
    (['red'], [1, 0, 0, 0]),
    (['red'] * 10, [1, 0, 0, 0]),
    # Three of ten said red: three judges see two others (2/3), seen by seven it is 1: 0.9.
    (['red'] * 3 + ['blue'] * 7, [0.9, 1, 0, 0]),
    # Two of ten: (2 * 1/3 + 8 * 2/3) / 10 = 0.6; one of ten: 9 * 1/3 / 10 = 0.3.
    (['red'] * 2 + ['dark green'] + ['blue'] * 7, [0.6, 1, 0, 0.3]),
    # Answers outside the list change nothing for those inside.
    (['mauve'] * 7 + ['red'] * 3, [0.9, 0, 0, 0]),
    # Spellings of one answer are merged.
    (['Red', 'red.', ' RED'] + ['the red'] * 7, [1, 0, 0, 0]),
    (['2'] * 10, [0, 0, 1, 0]),
    (['mauve'], [0, 0, 0, 0])])
def test_targets_of_people_who_disagree(vqa, answers, target):
  encoded = vqa.encode(asked(*answers), Placement(4, 4))
  scores = dict(zip(encoded['target_ids'], encoded['target_scores']))
  np.testing.assert_allclose([scores.get(i, 0) for i in range(4)], target, atol=1e-6)
  assert encoded['cls_weight'] == (sum(target) > 0)


def test_of_many_answers_the_best_are_targets(tokenizer):
  names = [f'answer {number}' for number in range(MAX_TARGETS + 1)]
  task = VQA(tokenizer, names, question_length=8, answer_length=4)
  people = [names[0], *(name for name in names[1:] for _ in range(3))]
  encoded = task.encode(asked(*people), Placement(4, 4))
  assert encoded['target_ids'].tolist() == list(range(1, MAX_TARGETS + 1))


def test_the_written_answer_is_the_commonest(vqa, tokenizer):
  people = ['red'] * 3 + ['Dark Green'] * 4 + ['dark green'] * 3
  encoded = vqa.encode(asked(*people), Placement(4, 4))
  assert tokenizer.decode(encoded['answer'][None]) == ['dark green']
  assert encoded['gen_weight'] == 1
  assert vqa.encode(Example(IMAGE, question='is it?'), Placement(4, 4))['gen_weight'] == 0


def test_the_answer_list_counts_a_vote_a_question():
  examples = [asked('yes'), asked('yes'), asked(*['No'] * 9, 'no'), asked(*['red'] * 9, 'blue'),
              asked('The no')]
  assert make_answer_list(examples, 2) == ('no', 'yes')  # a tie: alphabetical
  assert make_answer_list(examples, 9)[2:] == ('red', 'blue')
  with pytest.raises(UserError, match='none of 1 training examples has an answer'):
    make_answer_list([Example(IMAGE, question='what?')], 5)


# Losses against PyTorch


def test_losses_equal_torch_cross_entropy(vqa, tokenizer):
  batch = features(vqa, asked(*['red'] * 3, *['blue'] * 7), asked('two'), asked('dark green'))
  rng = np.random.default_rng(0)
  cls = rng.normal(size=(3, len(ANSWERS)), scale=3).astype(np.float32)
  gen = rng.normal(size=(3, 4, tokenizer.vocab_size), scale=3).astype(np.float32)
  losses = vqa.losses({'cls': jnp.asarray(cls), 'gen': jnp.asarray(gen)}, batch)
  np.testing.assert_allclose(
      losses['cls'], torch.nn.functional.cross_entropy(
          torch.tensor(cls), torch.tensor([[0.9 / 1.9, 1 / 1.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
          reduction='none'), rtol=1e-5)
  for i in range(3):
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(gen[i]), torch.tensor(batch['answer'][i]).long(),
        ignore_index=tokenizer.pad_id)
    np.testing.assert_allclose(losses['gen'][i], theirs, rtol=1e-5)
  assert vqa.loss_weights == {'cls': 1.0, 'gen': 0.5}


def test_an_example_without_answers_weighs_nothing_and_stays_finite(vqa, tokenizer):
  batch = features(vqa, Example(IMAGE, question='is it?'))
  outputs = {'cls': jnp.ones((1, 4)), 'gen': jnp.ones((1, 4, tokenizer.vocab_size))}
  assert all(np.isfinite(x).all() for x in vqa.losses(outputs, batch).values())
  assert all((w == 0).all() for w in vqa.weights(batch).values())


def test_progress_is_the_official_accuracy(vqa):
  batch = features(vqa, *[asked(*['red'] * 2, *['blue'] * 8)] * 3)
  logits = 9.0 * np.eye(4)[[1, 0, 2]]
  progress = vqa.progress({'cls': logits}, batch)
  np.testing.assert_allclose(progress['accuracy'], [1, 0.6, 0], atol=1e-6)


# Answers and scores


def test_decode_gives_answers_with_their_probabilities(vqa, tokenizer):
  arrays = {'top_index': np.array([[1, 3]]), 'top_probability': np.array([[0.75, 0.25]]),
            'tokens': tokenizer.encode(['dark green'], 6), 'log_probability': np.log([0.5])}
  prediction, = vqa.decode(arrays)
  assert prediction == Answer('blue', (('blue', 0.75), ('dark green', 0.25)),
                                  ('dark green', pytest.approx(0.5)))
  written_only, = vqa.decode({k: arrays[k] for k in ('tokens', 'log_probability')})
  assert written_only.answer == 'dark green' and written_only.top == ()
  assert vqa.describe(prediction).splitlines()[0].split() == ['75.0%', 'blue']


@pytest.mark.parametrize('beams', [1, 3])
def test_the_probability_of_a_written_answer_is_that_of_its_text(tokenizer, beams):
  """Equals the decoder without a cache; a trained model may use more beams."""
  config = tiny.changed(vqa__beams=beams, vqa__answer_length=5)
  plan._check_continues(config, tiny.changed(vqa__answer_length=5), 'run')
  task = VQA._make(config, types.SimpleNamespace(vocab_size=30, pad_id=0, eos_id=1), ANSWERS)
  model = build.make_model(config, task.tokenizer, {'vqa': task})
  rng = np.random.default_rng(0)
  batch = {'image': rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
           'vqa': {'question': rng.integers(2, 30, (4, 12)), 'answer': np.zeros((4, 5), int)}}
  variables = jax.jit(lambda: model.init(jax.random.key(0), batch, deterministic=True))()
  # Sharper logits than at initialisation, so that texts differ in length.
  variables = jax.tree.map(lambda x: 3 * x, variables)
  arrays = jax.jit(lambda v: model.apply(v, batch, method='predict'))(variables)['vqa']
  batch['vqa']['answer'] = arrays['tokens']
  log_probabilities = jax.nn.log_softmax(
      jax.jit(lambda v: model.apply(v, batch, deterministic=True))(variables)['vqa']['gen'])
  of_token = np.take_along_axis(log_probabilities, arrays['tokens'][..., None], axis=-1)[..., 0]
  ends = np.cumsum(arrays['tokens'] == 1, axis=1) - (arrays['tokens'] == 1)
  np.testing.assert_allclose(arrays['log_probability'], (of_token * (ends == 0)).sum(1),
                             rtol=1e-4, atol=1e-4)


def test_scores_by_family_by_hand(vqa):
  examples = [asked('red', question_type='color'), asked('blue', question_type='color'),
              asked(*['two'] * 3, *['one'] * 7, question_type='count')]
  predictions = [Answer('red', (('red', 0.9),), ('red', 0.9)),
                 Answer('red', (('red', 0.8),), ('blue', 0.9)),
                 Answer('2', (('2', 0.7),), ('one', 0.9))]
  scores = vqa.score(examples, predictions)
  assert scores['examples'] == 3
  assert scores['accuracy'] == pytest.approx((1 + 0 + 0.9) / 3)
  assert scores['written_accuracy'] == pytest.approx(1)
  assert scores['accuracy/color'] == pytest.approx(0.5)
  assert scores['accuracy/count'] == pytest.approx(0.9)
  assert scores['constant/color'] == pytest.approx(0.5)
  assert scores['constant/count'] == pytest.approx(1)
  assert scores['label_accuracy'] == pytest.approx(1 / 3)
  lines = vqa.table(scores).splitlines()
  assert [line.split()[0] for line in lines[1:]] == ['color', 'count', 'all']
  assert lines[-1].split()[1:] == ['3', '63.3%', '66.7%']
  untyped = vqa.score([asked('red'), asked('blue')], predictions[:2])
  assert [line.split()[0] for line in vqa.table(untyped).splitlines()[1:]] == ['all']


def test_examples_without_answers_are_not_scored(vqa):
  said = [Answer('red', (('red', 1.0),))] * 2
  assert vqa.score([asked('red'), Example(IMAGE, question='q?')], said)['accuracy'] == 1
  assert vqa.score([Example(IMAGE, question='q?')], said[:1]) == {}


# Messages before training


def test_both_heads_off_is_a_mistake(tokenizer):
  with pytest.raises(UserError, match='both heads are off'):
    VQA(tokenizer, ANSWERS, question_length=8, answer_length=4, classifier=False)


def test_answers_all_outside_the_list_are_a_mistake(vqa, tokenizer):
  outside = [asked('mauve'), asked('teal')]
  with pytest.raises(UserError, match='no answer of 2 examples is among the 4 of the answer list'):
    vqa.survey(outside)
  writer = VQA(tokenizer, ANSWERS, question_length=8, answer_length=4, classifier=False,
               generation_weight=1.0)
  assert not any('answer list' in note for note in writer.survey(outside))
  assert any('no answer among' in note for note in vqa.survey([*outside, asked('red')]))


def test_examples_without_questions_are_a_mistake(vqa):
  with pytest.raises(UserError, match='none of 1 examples has "question" and "answers"'):
    vqa.survey([Example(IMAGE, captions=('a cat',))])


def test_cut_questions_are_counted(vqa, tokenizer):
  long = 'is the thing red or blue or dark green or two things?'
  length = int(tokenizer.lengths([long])[0])
  line, = vqa.survey([asked('red'), asked('red', question=long), asked('red', question=long)])
  assert line.startswith(f'2 of 3 questions are longer than 8 tokens (the longest has {length})')
  note, = vqa.notes(asked('red', question=long))
  assert f'has {length} tokens' in note
  assert vqa.notes(asked('red')) == []


def test_an_unknown_task_names_those_there_are():
  with pytest.raises(UserError, match="no task 'vqq' .did you mean 'vqa'.*wanted one of .*vqa"):
    TASKS['vqq']
  with pytest.raises(UserError, match="no task 'card'"):  # a file in the folder, but not a task
    TASKS['card']


def test_a_saved_task_comes_back(vqa, tokenizer, tmp_path):
  vqa.save(str(tmp_path))
  loaded = VQA.from_files(tiny.get_config(), tokenizer, str(tmp_path))
  assert loaded.answers == vqa.answers
