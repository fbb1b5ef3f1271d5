"""Class names as data: padding, sampling, sharded encoding, and their gradients."""

import json
import os
import re
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharding
import tiny

from xmodal.data.tokenizer import train_tokenizer
from xmodal.models.names import Names, pad_names, read_names, sample_names
from xmodal.tasks.objects import Objects
from xmodal.train import build
from xmodal.train.plan import Plan
from xmodal.train.steps.gradients import make_gradients

TEXTS = ('cat', 'grey wolf', 'a very long name of a thing')


# Padding


@pytest.fixture(scope='module')
def tokenizer():
  return train_tokenizer(TEXTS, 60)


@pytest.mark.parametrize('end_token', [True, False])
@pytest.mark.parametrize('tower', ['t5', 'bert', 'gpt2'])
def test_padding_changes_no_vector(tokenizer, tower, end_token):
  c = build.resolve(tiny.changed(model__text__name=tower), {})
  if tower != 't5':
    c.model.text.head_dim = None
  task = Objects(tokenizer, TEXTS, max_objects=1)
  backbone = build.make_model(c, tokenizer, {'objects': task}).backbone
  names = task.vocabulary()
  padded = pad_names(names, tokenizer.pad_id)
  length = names.tokens.shape[1]
  assert padded.tokens.shape[0] == 8 and padded.tokens.shape[1] in (16, 32)
  assert padded.tokens.shape[1] > length
  assert padded.counts.tolist() == [True] * 3 + [False] * 5

  @jax.jit
  def read(variables, tokens):
    return backbone.apply(variables, tokens, end_token, deterministic=True, method='read_names')

  variables = jax.jit(lambda: backbone.init(
      jax.random.key(0), names.tokens, True, deterministic=True, method='read_names'))()
  plain, found = read(variables, names.tokens), read(variables, padded.tokens)
  np.testing.assert_allclose(found[:3], plain, rtol=1e-5, atol=1e-6)
  assert np.isfinite(found).all() and np.abs(plain[0] - plain[1]).max() > 1e-3


def test_names_are_not_padded_beyond_what_the_tower_reads():
  names = Names(np.ones((9, 33), np.int32))
  assert pad_names(names, 0).tokens.shape == (16, 64)
  assert pad_names(names, 0, longest=40).tokens.shape == (16, 40)
  # The tower itself reports that they are too long.
  assert pad_names(names, 0, longest=30).tokens.shape == (16, 33)


# Sampling


def test_names_of_the_batch_stay_and_others_come_by_chance():
  names, key = Names(np.arange(40, dtype=np.int32)[:, None]), jax.random.key(3)
  present = np.arange(40) % 13 == 0  # 4 of them

  @jax.jit
  def draw(key, present=present):
    return sample_names(names, present, 10, key).counts

  counts = np.stack([draw(jax.random.fold_in(key, step)) for step in range(600)])
  assert counts[:, present].all() and (counts.sum(1) == 10).all()
  # Each of the 36 absent names in 6 of 36 steps, within five standard deviations.
  assert np.abs(counts[:, ~present].mean(0) - 1 / 6).max() < 5 * (5 / 36 / 600) ** 0.5
  np.testing.assert_array_equal(draw(key), draw(key))
  assert (draw(key) != draw(jax.random.fold_in(key, 0))).any()
  # All names of the batch, although they exceed the number.
  many = np.arange(40) < 25
  np.testing.assert_array_equal(draw(key, many), many)
  assert sample_names(names, present, 40, key) is names


@pytest.mark.parametrize('present', [(), (3,), (0, 5, 9), tuple(range(8))])
def test_sampled_names_are_read_as_all_names_are(present):
  names = Names(np.arange(20, dtype=np.int32).reshape(10, 2))
  is_present = np.isin(np.arange(10), present)
  sampled = sample_names(names, is_present, 5, jax.random.key(0))
  table = jax.random.normal(jax.random.key(1), (20, 3))
  rows = []

  def encode(table, tokens):
    rows.append(len(tokens))
    return jnp.sin(table[tokens]).sum(1)

  def loss(vectors):
    return (jnp.where(sampled.counts[:, None], vectors, 0) ** 2).sum()

  @jax.jit
  def found(table):
    vectors, backward = read_names(sampled, encode, table)
    value, gradient = jax.value_and_grad(loss)(vectors)
    return value, *backward(gradient)

  value, gradient = found(table)
  assert set(rows) == {5, 10} and int(sampled.counts.sum()) == max(len(present), 5)
  expected = jax.value_and_grad(lambda table: loss(encode(table, names.tokens)))(table)
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)


# Gradients


class Matching(nn.Module):
  """The score of a picture for each name."""

  def setup(self):
    self.embedding, self.dense = nn.Embed(12, 4), nn.Dense(4)

  def read_names(self, tokens, end_token, *, deterministic):
    del end_token, deterministic
    return self.embedding(jnp.asarray(tokens)).mean(1)

  def __call__(self, batch, *, deterministic):
    names = batch['first']['vocabulary']
    vectors = names.vectors
    if vectors is None:
      vectors = self.read_names(names.tokens, True, deterministic=deterministic)
    outputs = self.dense(batch['image']) @ vectors.T
    return {'first': outputs, 'second': self.dense(batch['image']).sum(-1)}


class First:
  """Detects six names; a step samples three, or those present."""

  loss_weights = {'square': 1.0}
  names = Names(np.arange(12, dtype=np.int32).reshape(6, 2))

  def sampled_vocabulary(self, features, key):
    present = jnp.zeros(6, bool).at[features['names']].set(True)
    return sample_names(self.names, present, 3, key)

  def weights(self, features):
    return {'square': jnp.ones(len(features['names']))}

  def losses(self, outputs, features):
    target = jax.nn.one_hot(features['names'], 6)
    return {'square': (features['vocabulary'].counts * (outputs - target) ** 2).sum(-1)}

  def progress(self, outputs, features):
    return {}


class Second(First):
  """Detects no names."""

  def sampled_vocabulary(self, features, key):
    return None

  def losses(self, outputs, features):
    return {'square': outputs ** 2}


TASKS = {'first': First(), 'second': Second()}


@pytest.mark.parametrize('accumulation, separate', [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize('present', [(1, 4), (0, 1, 2, 3, 5)])
def test_names_are_chosen_once_for_all_micro_batches(accumulation, separate, present):
  rng = np.random.default_rng(0)
  # Micro-batches sample other names than the whole batch.
  features = {'names': np.resize(present, 8).astype(np.int32)}
  batch = {'image': rng.normal(size=(8, 5)).astype(np.float32), 'valid': np.ones(8, bool),
           'first': features, 'second': features}
  model, key = Matching(), jax.random.key(5)
  params = model.init(key, batch | {'first': {'vocabulary': First.names}},
                      deterministic=True)['params']
  gradients = jax.jit(lambda params: make_gradients(
      model, TASKS, {'first': 2.0, 'second': 1.0}, accumulation=accumulation, separate=separate)(
          params, {}, {}, batch, key, lambda losses: dict.fromkeys(losses, 1.0))[::2])
  grads, losses = gradients(params)
  plain = jax.jit(lambda params: make_gradients(
      model, TASKS, {'first': 2.0, 'second': 1.0})(
          params, {}, {}, batch, key, lambda losses: dict.fromkeys(losses, 1.0))[::2])(params)
  counts = np.abs(np.asarray(plain[0]['embedding']['embedding'])).sum(1).reshape(6, 2) > 0
  chosen = counts.all(1)
  assert counts.any(1).sum() == chosen.sum() == max(len(present), 3) and chosen[list(present)].all()

  def loss(params, first, second):  # with all names, by another formula
    vectors = params['embedding']['embedding'].reshape(6, 2, 4).mean(1)
    seen = batch['image'] @ params['dense']['kernel'] + params['dense']['bias']
    square = (seen @ vectors.T - jax.nn.one_hot(features['names'], 6)) ** 2
    return 2 * first * (chosen * square).sum(-1).mean() + second * (seen.sum(-1) ** 2).mean()

  expected = [jax.grad(loss)(params, *weights) for weights in ((1., 1.), (1., 0.), (0., 1.))]
  found = [grads['first'], grads['second']] if separate else [grads]
  for ours, theirs in zip(found, expected[1:] if separate else expected[:1], strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)
  assert losses['first'] == pytest.approx(float(loss(params, 1., 0.)), rel=1e-5)


# Eight devices


SAMPLED = 20  # of 24
MESHES = {'fsdp': (1, 8, 1), 'all': (2, 2, 2)}


def config():
  return tiny.changed(
      mixer__tasks=('detection',), mixer__weights=(1.0,),
      detection__sampled_names=SAMPLED)


def three_steps(name, sizes, folder):
  """The metrics of three steps on a mesh, and the rows of names per device."""
  programs, compile_step = [], test_sharding.compile_step

  def keep(run):
    programs.append(compile_step(run))
    return programs[0]

  test_sharding.compile_step = keep
  try:
    told = test_sharding.three_steps(sizes, os.path.join(folder, f'{name}.npz'), config())
  finally:
    test_sharding.compile_step = compile_step
  names = Plan(config(), 'unused').tasks['detection'].vocabulary()
  _, length = names.tokens.shape
  # Shapes of attention logits, [rows, heads, length, length]; one row: T5's position biases.
  rows = map(int, re.findall(rf'f32\[(\d+),[12],{length},{length}\]', programs[0].as_text()))
  return told | {'rows': sorted({*rows} - {1}), 'names': len(names.tokens)}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('steps')


@pytest.fixture(scope='module')
def on_eight(folder):
  return test_sharding.run_alone(__file__, folder)


@pytest.fixture(scope='module')
def on_one(folder):
  return three_steps('one', (1, 1, 1), folder)


@pytest.mark.parametrize('mesh', MESHES)
def test_names_on_eight_devices_teach_what_they_do_on_one(on_one, on_eight, folder, mesh):
  one, eight = on_one['metrics'], on_eight[mesh]['metrics']
  assert one[0]['loss'] != one[1]['loss'] and one[0].keys() == eight[0].keys()
  for a, b in zip(one, eight, strict=True):
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=2e-4, abs=1e-5), key
  ours, theirs = np.load(folder / f'{mesh}.npz'), np.load(folder / 'one.npz')
  of_text = [name for name in theirs if re.match('gradient.*backbone/text_(tower|projection)', name)
             and not name.endswith('key/bias')]
  assert sum(np.any(theirs[name]) for name in of_text) > 5
  for name in of_text:
    error = np.linalg.norm(ours[name] - theirs[name])
    assert error <= 1e-5 * np.linalg.norm(theirs[name]), name


@pytest.mark.parametrize('mesh', MESHES)
def test_a_device_reads_its_share_of_the_names(on_one, on_eight, mesh):
  assert on_one['names'] == 24 and set(on_one['rows']) == {SAMPLED, 24}
  ways = {'fsdp': 8, 'all': 4}[mesh]
  assert set(on_eight[mesh]['rows']) == {-(-SAMPLED // ways), -(-24 // ways)}


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps({name: three_steps(name, sizes, sys.argv[1]) for name, sizes in MESHES.items()}))
