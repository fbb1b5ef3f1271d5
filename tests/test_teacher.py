"""Imitation of a teacher, judged by PyTorch's divergences."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from xmodal.errors import UserError
from xmodal.tasks import imitation
from xmodal.tasks.detection.losses import Queries
from xmodal.tasks.detection.task import Detection
from xmodal.tasks.objects import Objects


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_divergence_is_pytorchs():
  logits, taught = normal(3, 5), 2 * normal(3, 5, seed=1)
  wanted = torch.nn.functional.kl_div(
      torch.tensor(logits).log_softmax(-1), torch.tensor(taught).log_softmax(-1),
      log_target=True, reduction='none').sum(-1)
  np.testing.assert_allclose(imitation.divergence(logits, taught), wanted, rtol=1e-4)
  np.testing.assert_allclose(imitation.divergence(taught, taught), 0, atol=1e-6)


def test_binary_divergence_is_pytorchs():
  logits, taught = normal(7), normal(7, seed=1)
  chance = torch.tensor(taught).sigmoid()
  both = torch.stack([chance, 1 - chance]).log()
  own = torch.stack([torch.tensor(logits), -torch.tensor(logits)]).sigmoid().log()
  wanted = torch.nn.functional.kl_div(own, both, log_target=True, reduction='none').sum(0)
  np.testing.assert_allclose(imitation.binary_divergence(logits, taught), wanted, rtol=1e-3,
                             atol=1e-6)


def test_a_text_counts_to_its_end():
  logits, taught = normal(1, 3, 5), normal(1, 3, 5, seed=1)
  tokens = jnp.array([[4, 1, 0]])
  wanted = imitation.divergence(logits, taught)[:, :2].mean(-1)
  np.testing.assert_allclose(imitation.divergence_of_text(logits, taught, tokens, 0), wanted)


def test_similarities_do_not_depend_on_width_or_rotation():
  tokens = normal(2, 6, 4)
  rotation = np.linalg.qr(normal(4, 4, seed=1))[0]
  wider = np.concatenate([tokens @ rotation, np.zeros((2, 6, 3), np.float32)], -1) * 3
  np.testing.assert_allclose(imitation.unlikeness(tokens, wider), 0, atol=1e-6)
  assert np.all(imitation.unlikeness(tokens, normal(2, 6, 7, seed=2)) > 0.01)


def test_gradients_go_to_the_student_alone():
  for function in (imitation.divergence, imitation.binary_divergence):
    own, teachers = jax.grad(lambda a, b: function(a, b).sum(), (0, 1))(  # noqa: B023
        normal(2, 3), normal(2, 3, seed=1))
    assert np.abs(own).max() > 0 and not np.abs(teachers).any()


def queries(seed):
  boxes = np.sort(np.random.default_rng(seed).uniform(size=(2, 6, 4)).astype(np.float32), -1)
  return {'names': Queries(normal(2, 6, 3, seed=seed), boxes)}


def test_detection_imitates_scores_and_boxes():
  task = Detection.__new__(Detection)
  same = task.imitation(queries(0), queries(0), {})
  other = task.imitation(queries(0), queries(1), {})
  assert set(same) == {'names', 'boxes'}
  for term in same:
    np.testing.assert_allclose(same[term], 0, atol=1e-6)
    assert np.all(other[term] > 0.01)
  fewer = jax.tree.map(lambda x: x[:, :5], queries(1))
  assert task.imitation(queries(0), fewer, {}) == {}


def test_padding_is_not_imitated():
  task = Objects.__new__(Objects)
  logits, taught = normal(1, 2, 2, 3), normal(1, 2, 2, 3, seed=1)
  logits[:, 1], taught[:, 1] = -np.inf, -np.inf
  found = task.imitation(logits, taught, {})['names']
  wanted = imitation.binary_divergence(logits[:, 0], taught[:, 0]).sum(-1).mean()
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_model_that_starts_as_its_teacher_has_nothing_to_imitate(finished, tmp_path):
  c = tiny.changed(train__start_from=str(finished), train__teacher=str(finished), train__steps=2,
                   optimizer__learning_rate=0.05)
  tiny.train(tmp_path / 'run', c)
  lines = [json.loads(line) for line in open(tmp_path / 'run' / 'metrics.jsonl')]
  first, second = ([line for line in lines if (line['step'], line['split'], line['task']) == (
      step, 'train', 'vqa')][0] for step in (1, 2))
  terms = ('imitation_cls', 'imitation_gen', 'imitation_tokens')
  assert all(abs(first[term]) < 1e-6 for term in terms)
  # The first step's rate is 0.
  assert all(abs(second[term]) < 1e-6 for term in terms)
  total = first['cls'] + 0.1 * first['gen'] + sum(first[term] for term in terms)
  assert first['loss'] == pytest.approx(total, rel=1e-5)


def test_another_model_has_something_to_imitate(finished, tmp_path):
  # As a run that starts anew has the tokenizer of its data, it is that of the teacher.
  c = tiny.changed(train__teacher=str(finished), train__steps=2, seed=1, train__accumulation=2,
                   model__dropout_rate=0.1)
  tiny.train(tmp_path / 'run', c)
  with open(tmp_path / 'run' / 'metrics.jsonl') as f:
    line = next(line for line in map(json.loads, f) if (line['split'], line['task']) == (
        'train', 'vqa'))
  assert line['imitation_gen'] > 1e-3 and line['imitation_tokens'] > 1e-3
  total = line['cls'] + 0.1 * line['gen'] + sum(
      value for name, value in line.items() if name.startswith('imitation'))
  assert line['loss'] == pytest.approx(total, rel=1e-5)


def test_tokens_are_compared_where_both_call_a_stack_equally_often():
  own = {'a': [normal(2, 3, 4), normal(2, 3, 4, seed=1)], 'b': [normal(2, 3, 4)],
         'names': [normal(5, 3, 4)]}
  other = {'a': [normal(2, 3, 4, seed=2)], 'b': [normal(2, 3, 4, seed=3)],
           'names': [normal(5, 3, 4, seed=4)]}
  np.testing.assert_allclose(imitation.likeness_loss(own, other, 2),
                             imitation.unlikeness(own['b'][0], other['b'][0]))
  assert imitation.likeness_loss(own, {}, 2) is None


@pytest.mark.parametrize('changes, wanted', [
    ({'data__image_size': 64}, 'it has other config.data.image_size'),
    ({'vqa__max_answers': 3}, 'it has other labels of vqa'),
    ({'mixer__tasks': ('captioning',), 'mixer__weights': (1.,)},
     r'it has learned vqa, objects, none of which is in config.mixer.tasks=\(.captioning.,\)'),
])
def test_a_teacher_that_reads_something_else(finished, tmp_path, changes, wanted):
  c = tiny.changed(train__start_from=str(finished), train__teacher=str(finished), **changes)
  with pytest.raises(UserError, match=wanted):
    tiny.train(tmp_path / 'run', c)


def test_a_teacher_that_is_not_there(tmp_path):
  c = tiny.changed(train__teacher=str(tmp_path / 'none'))
  with pytest.raises(UserError, match='config.train.teacher=.*no checkpoint in'):
    tiny.train(tmp_path / 'run', c)
