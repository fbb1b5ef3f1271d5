"""The training step on a model of one layer: means, accumulation, bad gradients, EMA."""

import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from xmodal.errors import UserError
from xmodal.models.cross_modal import CrossModal
from xmodal.sharding.rules import path_name
from xmodal.train.checkpoints.checkpoint import Checkpoints, find, load_variables
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.optimizer.schedules import changed_rate, make_schedule
from xmodal.train.plan import Plan
from xmodal.train.programs import compile_step
from xmodal.train.steps import state as states
from xmodal.train.steps.step import make_train_step


class Regression:
  """A task with two loss terms, one with weights for some examples only."""

  loss_weights = {'square': 1.0, 'absolute': 0.5}

  def sampled_vocabulary(self, features, key):
    return None  # no names to sample

  def weights(self, features):
    return {'square': jnp.ones_like(features['y']), 'absolute': features['counts']}

  def losses(self, outputs, features):
    error = outputs - features['y']
    return {'square': error ** 2, 'absolute': jnp.abs(error)}

  def progress(self, outputs, features):
    return {'accuracy': (jnp.abs(outputs - features['y']) < 1).astype(jnp.float32)}


class Linear(nn.Module):
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, batch, *, deterministic):
    x = nn.Dropout(self.dropout_rate)(batch['image'], deterministic=deterministic)
    return {'task': nn.Dense(1)(x)[:, 0]}


def a_batch(seed=0, size=8):
  rng = np.random.default_rng(seed)
  return {'image': rng.normal(size=(size, 5)).astype(np.float32),
          'valid': np.ones(size, bool),
          'task': {'y': rng.normal(size=size).astype(np.float32),
                   'counts': (rng.random(size) < 0.6).astype(np.float32)}}


def start(model=Linear(), optimizer=optax.adam(0.1), **options):
  """A new state and the compiled step."""
  ema = options.get('ema_decay', 0.0) > 0
  state = states.init_fn(states.variables_fn(model, a_batch(), 0), optimizer, 0, ema)()
  step = make_train_step(model, {'task': Regression()}, {'task': 2.0}, optimizer, **options)
  return state, jax.jit(step)


class SomeRegression(Regression):
  """A batch of which only some examples have weights."""

  def weights(self, features):
    return {'square': features['counts'], 'absolute': features['counts']}


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_progress_is_the_mean_over_examples_that_count():
  batch = a_batch()
  batch['task']['counts'] = np.array([1, 0, 1, 0, 1, 0, 1, 1], np.float32)
  batch['valid'][7] = False
  state, _ = start()
  step = make_train_step(Linear(), {'task': SomeRegression()}, {'task': 2.0}, optax.sgd(0.1))
  found = jax.jit(step)(state.replace(opt_state=optax.sgd(0.1).init(state.params)), batch)[1]
  some = {'image': batch['image'][:7:2], 'valid': np.ones(4, bool),
          'task': {key: x[:7:2] for key, x in batch['task'].items()}}
  error = np.asarray(Linear().apply({'params': state.params}, some, deterministic=True)['task']
                     - some['task']['y'])
  assert 0 < (np.abs(error) < 1).sum() < 4
  assert found['task/accuracy'] == pytest.approx((np.abs(error) < 1).mean())


def test_loss_and_gradient_equal_torch():
  import torch
  batch = a_batch()
  batch['valid'][6:] = False
  state, step = start(optimizer=optax.sgd(0.1))
  new, metrics = step(state, batch)
  dense = state.params['Dense_0']
  kernel, bias = (torch.tensor(np.array(dense[k]), requires_grad=True) for k in ('kernel', 'bias'))
  x, y, counts = (torch.tensor(values[:6]) for values in (
      batch['image'], batch['task']['y'], batch['task']['counts']))
  error = (x @ kernel)[:, 0] + bias - y
  loss = 2 * ((error ** 2).mean() + 0.5 * (error.abs() * counts).sum() / counts.sum())
  loss.backward()
  np.testing.assert_allclose(metrics['loss'], loss.item(), rtol=1e-5)
  norm = (kernel.grad.square().sum() + bias.grad.square().sum()).sqrt()
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)
  np.testing.assert_allclose(
      new.params['Dense_0']['kernel'], (kernel - 0.1 * kernel.grad).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('accumulation', [2, 4])
def test_accumulation_equals_the_large_batch(accumulation):
  """Also if micro-batches have different numbers of weighted examples."""
  batch = a_batch()
  batch['valid'][5] = False
  state, whole = start(ema_decay=0.9)
  _, parts = start(ema_decay=0.9, accumulation=accumulation)
  for _ in range(2):
    expected, metrics = whole(state, batch)
    found, part_metrics = parts(state, batch)
    assert_close((found.params, found.ema), (expected.params, expected.ema))
    assert_close(part_metrics, metrics)
    state = expected


def test_fillers_change_nothing():
  batch = a_batch()
  batch['valid'][4:] = False
  other = a_batch(seed=1)
  mixed = jax.tree.map(lambda a, b: np.concatenate([a[:4], b[4:]]), batch, other)
  mixed['valid'] = batch['valid']
  state, step = start()
  (a, a_metrics), (b, b_metrics) = step(state, batch), step(state, mixed)
  assert_same((a.params, a_metrics), (b.params, b_metrics))
  # The mean is over the four weighted examples, not over eight.
  twice = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), batch)
  assert_close(step(state, twice)[1], a_metrics)


def test_a_batch_of_fillers_is_harmless():
  batch = a_batch()
  batch['valid'][:] = False
  state, step = start(optimizer=optax.sgd(0.1))
  new, metrics = step(state, batch)
  assert metrics['loss'] == 0
  assert_same(new.params, state.params)


def test_a_gradient_that_is_not_finite_changes_nothing():
  good, bad = a_batch(), a_batch()
  bad['task']['y'][2] = np.nan
  state, step = start(ema_decay=0.9)
  state, _ = step(state, good)  # so that moments and average are not zero
  skipped, metrics = step(state, bad)
  for field in ('params', 'opt_state', 'ema', 'collections', 'rng'):
    assert_same(getattr(skipped, field), getattr(state, field))
  assert (skipped.step, skipped.skipped, skipped.skipped_in_a_row) == (2, 1, 1)
  again, _ = step(skipped, bad)
  assert (again.skipped, again.skipped_in_a_row) == (2, 2)
  after, metrics = step(again, good)
  assert (after.step, after.skipped, after.skipped_in_a_row) == (4, 2, 0)
  assert np.isfinite(metrics['loss'])
  # Training continues exactly as without the bad batches.
  assert_same(after.params, step(state, good)[0].params)


def test_logged_norms_and_rate_are_those_of_what_was_applied():
  schedule = optax.linear_schedule(0.1, 0.0, 10)
  good, bad = a_batch(), a_batch()
  bad['task']['y'][2] = np.nan
  state, step = start(optimizer=optax.adam(schedule), schedule=schedule)
  for batch, rate in ((good, 0.1), (good, 0.09), (bad, 0.08), (good, 0.08)):
    new, metrics = step(state, batch)
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, new.params, state.params)
    lengths = [np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))
               for tree in (moved, new.params)]
    np.testing.assert_allclose([metrics['update_norm'], metrics['parameter_norm']], lengths,
                               rtol=1e-5)
    assert metrics['learning_rate'] == pytest.approx(rate)
    assert (metrics['update_norm'] == 0) == (batch is bad)
    state = new


@pytest.mark.parametrize('still', ['frozen', 'resting'])
def test_logged_norms_leave_out_parameters_that_do_not_move(still):
  names = frozenset({'Dense_0/kernel'})
  state, _ = start()
  optimizer = optax.adam(0.1)
  trained = state.params if still == 'resting' else {'Dense_0': {
      'bias': state.params['Dense_0']['bias']}}
  state = state.replace(opt_state=optimizer.init(trained))
  step = jax.jit(make_train_step(Linear(), {'task': Regression()}, {'task': 2.0}, optimizer,
                                 **{still: names}))
  new, metrics = step(state, a_batch())
  assert_same(new.params['Dense_0']['kernel'], state.params['Dense_0']['kernel'])
  before, after = (np.array(s.params['Dense_0']['bias']) for s in (state, new))
  assert metrics['update_norm'] == pytest.approx(np.linalg.norm(after - before), rel=1e-5)
  whole = np.concatenate([after, np.ravel(new.params['Dense_0']['kernel'])])
  assert metrics['parameter_norm'] == pytest.approx(
      np.linalg.norm(after if still == 'frozen' else whole), rel=1e-5)


def test_the_moving_average_follows_the_parameters():
  state, step = start(ema_decay=0.9)
  average = np.array(state.params['Dense_0']['kernel'])
  for number in range(4):
    state, _ = step(state, a_batch(seed=number))
    decay = min(0.9, (1 + number) / (10 + number))
    average = decay * average + (1 - decay) * np.array(state.params['Dense_0']['kernel'])
    np.testing.assert_allclose(state.ema['Dense_0']['kernel'], average, rtol=1e-5, atol=1e-7)
  assert state.variables['params'] is state.ema
  without, _ = start()
  assert without.variables['params'] is without.params


def test_dropout_differs_by_step_and_comes_again():
  state, step = start(Linear(dropout_rate=0.5), optax.sgd(0.0))
  batch = a_batch()
  first, metrics = step(state, batch)
  _, again = step(state, batch)
  _, later = step(first, batch)
  assert metrics['loss'] == again['loss'] != later['loss']


# Dropout and the moving average of the whole model


@pytest.fixture(scope='module')
def whole():
  """A run with dropout and EMA, and its state with random parameters."""
  run = Plan(tiny.changed(model__dropout_rate=0.3, train__ema_decay=0.2), 'unused')
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.abstract)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
                        run.abstract.params)
  return run, state.replace(params=params, ema=params)


def test_dropout_of_the_whole_model_is_of_training_alone(whole):
  run, state = whole
  batch = run.maker('eval')(np.arange(4), np.arange(4))

  @functools.partial(jax.jit, static_argnames='deterministic')
  def outputs(seed, deterministic):
    return jax.tree.leaves(run.model.apply(
        state.variables, batch, deterministic=deterministic,
        rngs={'dropout': jax.random.key(seed)}))

  plain, trained = outputs(0, True), outputs(0, False)
  assert_same(outputs(1, True), plain)
  assert_same(outputs(0, False), trained)
  for other in (outputs(1, False), plain):
    assert len(other) == 3  # the classifier, the written answer, the objects
    for a, b in zip(other, trained, strict=True):
      assert np.abs(a - b).max() > 0.01 * np.abs(b).max()


@pytest.mark.parametrize('variant', ['co_attention', 'merged'])
def test_each_layer_drops_what_it_will(variant):
  """Layers that add 1 to kept elements: with a shared mask all sums would be even."""
  model = CrossModal(variant, hidden_dim=16, mlp_dim=4, num_heads=2, num_layers=2, dropout_rate=0.3)
  zeros, mask = np.zeros((2, 3, 16), np.float32), np.ones((2, 3), bool)
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), zeros, zeros, mask, deterministic=True))
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: np.full(x.shape, path_name(path).endswith(('out/bias', 'down/bias')),
                              np.float32), shapes)
  for stream in jax.jit(functools.partial(model.apply, deterministic=False))(
      params, zeros, zeros, mask, rngs={'dropout': jax.random.key(0)}):
    kept = 0.7 * np.asarray(stream)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    assert 0.3 < (np.round(kept) % 2).mean() < 0.7


def test_the_average_of_the_whole_model_is_saved_and_loaded(whole, tmp_path):
  run, state = whole
  step, make = compile_step(run), run.maker('train')

  def leaf(params):
    return np.array(params['backbone']['text_tower']['token_embedding']['embedding'])

  state = jax.tree.map(jnp.copy, state)  # a step donates its state
  average = leaf(state.params)
  for number, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
    state, _ = step(state, make(np.arange(8) + 8 * number, np.arange(8) + 8 * number))
    average = decay * average + (1 - decay) * leaf(state.params)
    np.testing.assert_allclose(leaf(state.ema), average, rtol=1e-5, atol=1e-7)
  assert np.abs(leaf(state.ema) - leaf(state.params)).max() > 1e-5

  (tmp_path / 'assets').mkdir()
  checkpoints = Checkpoints(str(tmp_path / 'run'), keep=1)
  checkpoints.save(state, str(tmp_path / 'assets'))
  checkpoints.wait()
  assert_same(checkpoints.restore(run.abstract, pytest.fail), state)
  checkpoints.close()
  abstract = {'params': run.abstract.params, **run.abstract.collections}
  loaded = load_variables(find(str(tmp_path / 'run')), abstract, ema=True)
  assert_same(loaded, {'params': state.ema, **state.collections})


# The optimizer


def params_like_the_model(tmp_path):
  """A tree with the model's names and one number per parameter, which is faster."""
  run = Plan(tiny.get_config(), str(tmp_path))
  return jax.tree.map(lambda _: np.ones(1, np.float32), run.abstract.params)


def test_weight_decay_is_of_kernels_and_token_embeddings_alone(tmp_path):
  params = params_like_the_model(tmp_path)
  c = tiny.get_config().optimizer
  optimizer = make_optimizer(c, optax.constant_schedule(0.1), params)
  zero = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  moved = {path_name(path): -float(x[0])
           for path, x in jax.tree_util.tree_leaves_with_path(updates)}
  decayed = {name for name, size in moved.items() if size}
  assert all(moved[name] == pytest.approx(0.1 * c.weight_decay) for name in decayed)

  def kinds(names):
    """The last part of each name; for embeddings, the last two."""
    parts = [name.split('/') for name in names]
    return {'/'.join(part[-2:]) if part[-1] == 'embedding' else part[-1] for part in parts}

  assert kinds(decayed) == {'kernel', 'token_embedding/embedding'}
  assert kinds(moved.keys() - decayed) == {
      'bias', 'scale', 'encoder_relative_bias/embedding', 'decoder_relative_bias/embedding',
      'position_embedding', 'row_embedding', 'column_embedding', 'log_scale', 'score_bias'}


def test_the_schedule_warms_up_and_decays():
  c = tiny.changed(optimizer__warmup_steps=10, optimizer__learning_rate=0.5).optimizer
  schedule = make_schedule(c, 100)
  assert schedule(0) == 0 and schedule(5) == pytest.approx(0.25)
  assert schedule(10) == pytest.approx(0.5) and schedule(100) == pytest.approx(0.005)
  with pytest.raises(UserError, match='warmup_steps=10 leaves nothing of config.train.steps=10'):
    make_schedule(c, 10)


@pytest.mark.parametrize('name', ['linear', 'constant', 'wsd'])
def test_rates_are_those_of_transformers(name):
  import torch
  from transformers import optimization
  a_layer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
  theirs = {
      'linear': lambda: optimization.get_wsd_schedule(
          a_layer, 10, 90, num_stable_steps=0, decay_type='linear', min_lr_ratio=0.1),
      'constant': lambda: optimization.get_constant_schedule_with_warmup(a_layer, 10),
      'wsd': lambda: optimization.get_wsd_schedule(
          a_layer, 10, 20, num_stable_steps=70, decay_type='1-sqrt', min_lr_ratio=0.1)}[name]()
  ours = make_schedule(tiny.changed(
      optimizer__schedule=name, optimizer__warmup_steps=10, optimizer__end_share=0.1,
      optimizer__learning_rate=0.5).optimizer, 100)
  assert ours(0) == 0 and ours(5) == pytest.approx(0.25)  # theirs starts at the final rate
  np.testing.assert_allclose([ours(step) for step in range(10, 110)],
                             [0.5 * theirs.lr_lambdas[0](step) for step in range(10, 110)],
                             rtol=1e-5)


def test_a_schedule_that_does_not_exist_is_named():
  with pytest.raises(UserError, match="no schedule 'cosin' .did you mean 'cosine'"):
    make_schedule(tiny.changed(optimizer__schedule='cosin').optimizer, 10)


@pytest.mark.parametrize('begun, now, told', [
    (dict(train__steps=100), dict(train__steps=200), 'to 0.000509, .* 1e-05 .*was 100 and is 200'),
    (dict(train__steps=100), dict(train__steps=200, optimizer__schedule='constant'), '0.001, '),
    (dict(train__steps=100), dict(train__steps=100), None),
    (dict(train__steps=200, optimizer__schedule='constant'),
     dict(train__steps=300, optimizer__schedule='wsd'), None),
    (dict(train__steps=110, optimizer__schedule='wsd'),
     dict(train__steps=300, optimizer__schedule='wsd'), '0.001, .* 0.000269 ')])
def test_a_rate_that_jumps_when_a_run_goes_on_is_told(begun, now, told):
  lines = list(changed_rate(tiny.changed(**now), tiny.changed(**begun), 100))
  assert len(lines) == (told is not None)
  if told:
    assert re.search(told, lines[0]) and '\n' not in lines[0]
