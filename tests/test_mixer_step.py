"""Steps of several tasks on a model of one shared layer: updates, frozen heads and weights."""

import functools
import itertools

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import Regression, a_batch, assert_close, assert_same
import tiny
import torch

from xmodal.errors import UserError
from xmodal.mixer.balance.balance import make_balance
from xmodal.mixer.sampling.sampling import StepKind
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.steps import resting
from xmodal.train.steps import state as states
from xmodal.train.steps.gradient_agreement import make_measure
from xmodal.train.steps.step import make_train_step

TASKS = ('a', 'b', 'c')
SGD = optax.sgd(0.1)
WEIGHTS = {'a': 1.0, 'b': 3.0, 'c': 0.5}


class Heads(nn.Module):
  """A layer shared by all tasks, one shared by a and b, and a head per task."""

  @nn.compact
  def __call__(self, batch, *, deterministic):
    x = nn.tanh(nn.Dense(6, name='tower')(batch['image']))
    both = nn.tanh(nn.Dense(4, name='fused')(x)) if {'a', 'b'} & batch.keys() else None
    return {name: nn.Dense(1, name=f'heads_{name}')(x if name == 'c' else both)[:, 0]
            for name in TASKS if name in batch}


USED = {'a': ('tower', 'fused', 'heads_a'), 'b': ('tower', 'fused', 'heads_b'),
        'c': ('tower', 'heads_c')}
USED = {task: frozenset(f'{layer}/{name}' for layer in layers for name in ('kernel', 'bias'))
        for task, layers in USED.items()}
SHARED = resting.shared(USED, frozenset())


def batch_of(tasks=TASKS, seed=0):
  """Every task has its own pictures."""
  parts = {}
  for task in tasks:
    part = a_batch(seed=seed + 10 * TASKS.index(task))
    parts[task] = {'image': part['image'], 'valid': part['valid'], task: part['task']}
  return parts


def balance(name, **values):
  return make_balance(tiny.changed(
      mixer__tasks=TASKS, mixer__balance=name, mixer__weights=tuple(WEIGHTS.values()), **values),
                      True)


@functools.cache
def start(name='fixed', kind=StepKind(TASKS), optimizer=optax.adamw(0.05, weight_decay=0.1),
          **options):
  """A new state and the compiled step of a kind."""
  rule, variables = balance(name), states.variables_fn(Heads(), batch_of(), 0)
  params = jax.eval_shape(variables)['params']
  state = states.init_fn(variables, optimizer, 0, False, balance=rule)()
  step = make_train_step(
      Heads(), {task: Regression() for task in kind.tasks}, WEIGHTS, optimizer, balance=rule,
      resting=resting.resting(kind, USED, params, frozenset()), shared=SHARED, **options)
  return state, jax.jit(step)


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def task_gradient(params, batch, task):
  """Gradients of one task alone, by another formula: {path: array}."""
  def loss(params):
    part = batch[task]
    x = jnp.tanh(part['image'] @ params['tower']['kernel'] + params['tower']['bias'])
    if task != 'c':
      x = jnp.tanh(x @ params['fused']['kernel'] + params['fused']['bias'])
    head = params[f'heads_{task}']
    error = (x @ head['kernel'] + head['bias'])[:, 0] - part[task]['y']
    counts = part[task]['counts']
    return WEIGHTS[task] * (
        (error ** 2).mean() + 0.5 * (counts * jnp.abs(error)).sum() / counts.sum())

  return {name: np.array(x) for name, x in flat(jax.grad(loss)(params)).items()}


def test_the_parameters_of_each_task_are_found():
  assert SHARED == USED['a'] & USED['b']
  params = jax.eval_shape(states.variables_fn(Heads(), batch_of(), 0))['params']
  assert flat(params).keys() == set().union(*USED.values())


def test_the_sum_over_three_sources_has_the_sum_of_their_gradients():
  state, step = start(optimizer=SGD)
  batch = batch_of()
  new, metrics = step(state, batch)
  for name, x in flat(new.params).items():
    total = sum(task_gradient(state.params, batch, task)[name] for task in TASKS)
    np.testing.assert_allclose(x, flat(state.params)[name] - 0.1 * total, rtol=1e-4, atol=1e-6)
  told = {key: float(value) for key, value in metrics.items()}
  assert {task: told[f'{task}/weight'] for task in TASKS} == pytest.approx(WEIGHTS)
  assert told['loss'] == pytest.approx(
      sum(told[f'{task}/weight'] * told[f'{task}/loss'] for task in TASKS), rel=1e-5)


def test_pcgrad_projects_what_is_shared_and_leaves_the_heads_whole():
  for seed in range(5):
    state, step = start('pcgrad', optimizer=SGD)
    batch = batch_of(seed=seed)
    new, _ = step(state, batch)
    grads = {task: task_gradient(state.params, batch, task) for task in TASKS}
    moved = {name: (flat(state.params)[name] - x) / 0.1 for name, x in flat(new.params).items()}

    def vector(of):
      return np.concatenate([of[name].ravel() for name in sorted(SHARED)])

    candidates = []
    for orders in itertools.product(itertools.permutations(TASKS), repeat=3):
      total = 0
      for task, order in zip(TASKS, orders):
        grad = vector(grads[task])
        for other in order:
          if other != task and (product := grad @ vector(grads[other])) < 0:
            grad = grad - product / (vector(grads[other]) @ vector(grads[other])) * vector(
                grads[other])
        total = total + grad
      candidates.append(total)
    distance = np.abs(np.array(candidates) - vector(moved)).max(-1).min()
    assert distance < 1e-4
    for task in TASKS:
      for name in USED[task] - SHARED:
        np.testing.assert_allclose(moved[name], grads[task][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['pcgrad', 'gradnorm', 'famo'])
def test_the_loss_is_the_weighted_sum_of_those_of_the_tasks(name):
  state, step = start(name)
  for seed in range(2):
    state, metrics = step(state, batch_of(seed=seed))
  told = {key: float(value) for key, value in metrics.items()}
  assert told['loss'] == pytest.approx(
      sum(told[f'{task}/weight'] * told[f'{task}/loss'] for task in TASKS), rel=1e-5)
  if name == 'pcgrad':
    assert {task: told[f'{task}/weight'] for task in TASKS} == pytest.approx(WEIGHTS)


@pytest.mark.parametrize('kind, rest', [
    (StepKind(('c',)), ('fused', 'heads_a', 'heads_b')), (StepKind(('a', 'b')), ('heads_c',)),
    (StepKind(TASKS, 'tower|heads_a'), ('fused', 'heads_b', 'heads_c'))], ids=str)
def test_what_a_step_does_not_train_keeps_its_bits_and_its_moments(kind, rest):
  state, joint = start()
  state, _ = joint(state, batch_of())  # so that momentum and decay would move everything
  _, step = start(kind=kind)
  new, metrics = step(state, batch_of(kind.tasks))
  moments = [[optax.tree.get(s.opt_state, moment) for s in (new, state)] for moment in ('mu', 'nu')]
  for tree, old in ((new.params, state.params), *moments):
    for layer in old:
      same = all((np.asarray(tree[layer][k]) == np.asarray(x)).all() for k, x in old[layer].items())
      assert same == (layer in rest), layer
  gradients = [task_gradient(state.params, batch_of(), task) for task in kind.tasks]
  moving = [sum(grad[f'{layer}/{k}'] for grad in gradients)
            for layer in state.params if layer not in rest for k in ('kernel', 'bias')]
  norm = np.sqrt(sum((x ** 2).sum() for x in moving))
  assert metrics['gradient_norm'] == pytest.approx(norm, rel=1e-4)


def test_parameters_that_two_optimizers_share_keep_their_moments_too():
  def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 'adam' if 'bias' in str(path) else 'momentum', params)

  optimizer = optax.partition({'adam': optax.adam(0.05), 'momentum': optax.sgd(0.05, 0.9)}, labels)
  state, joint = start(optimizer=optimizer)
  state, _ = joint(state, batch_of())
  _, step = start(kind=StepKind(('c',)), optimizer=optimizer)
  new, _ = step(state, batch_of(('c',)))
  found = set()
  for (path, x), old in zip(jax.tree_util.tree_leaves_with_path(new.opt_state),
                            jax.tree.leaves(state.opt_state), strict=True):
    layer = next((layer for layer in state.params if f"'{layer}'" in str(path)), None)
    if layer:
      found.add((layer, bool((np.asarray(x) == np.asarray(old)).all())))
  assert found == {(layer, layer in ('fused', 'heads_a', 'heads_b')) for layer in state.params}


def optimizer_of(kinds, used, params, **values):
  """AdamW or Muon for a run with these kinds of steps, at a constant rate."""
  c = tiny.changed(optimizer__b2=0.999, optimizer__clip_norm=1e9, **values).optimizer
  return make_optimizer(c, optax.constant_schedule(0.02), params,
                        [resting.resting(kind, used, params, frozenset()) for kind in kinds])


def test_parameters_that_rest_are_moved_as_torch_does_those_without_gradient():
  """PyTorch counts steps per parameter; the moments of c start after ten skipped steps."""
  kinds = StepKind(('a', 'b')), StepKind(('c',))
  params = jax.eval_shape(states.variables_fn(Heads(), batch_of(), 0))['params']
  optimizer = optimizer_of(kinds, USED, params)
  steps = [start(kind=kind, optimizer=optimizer)[1] for kind in kinds]
  state, _ = start(kind=kinds[0], optimizer=optimizer)
  theirs = {name: torch.nn.Parameter(torch.tensor(np.array(x)))
            for name, x in flat(state.params).items()}
  adamw = torch.optim.AdamW([
      {'params': [x for name, x in theirs.items() if name.endswith(end)], 'weight_decay': decay}
      for end, decay in (('kernel', 0.05), ('bias', 0.0))], lr=0.02, betas=(0.9, 0.999), eps=1e-8)
  for number, kind in enumerate([0] * 10 + [1, 0, 1, 1, 0]):
    batch = batch_of(kinds[kind].tasks, seed=number)
    grads = [task_gradient(state.params, batch, task) for task in kinds[kind].tasks]
    used = set().union(*(USED[task] for task in kinds[kind].tasks))
    for name, x in theirs.items():
      x.grad = torch.tensor(sum(grad[name] for grad in grads)) if name in used else None
    adamw.step()
    state, _ = steps[kind](state, batch)
    for name, x in flat(state.params).items():
      np.testing.assert_allclose(x, theirs[name].detach(), rtol=1e-3, atol=2e-5, err_msg=name)


class Matrices(nn.Module):
  """Two tasks that share nothing, each with stacked layer matrices."""

  @nn.compact
  def __call__(self, batch, *, deterministic):
    return {task: Stack(name=f'{task}_layers')(batch['image']) for task in 'ab' if task in batch}


class Stack(nn.Module):

  @nn.compact
  def __call__(self, x):
    up = nn.vmap(nn.Dense, variable_axes={'params': 0}, split_rngs={'params': True})(5, name='up')
    return nn.Dense(1, name='last')(nn.tanh(up(jnp.stack([x, x])).sum(0)))[:, 0]


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_task_that_shares_nothing_learns_in_turns_as_it_does_alone(name):
  def batch_of_two(tasks, seed):
    batch = a_batch(seed=seed)
    return {'image': batch['image'], 'valid': batch['valid'], **dict.fromkeys(
        tasks, batch['task'])}

  variables = states.variables_fn(Matrices(), batch_of_two('ab', 0), 0)
  params = jax.eval_shape(variables)['params']
  used = {task: frozenset(path for path in flat(params) if path.startswith(task)) for task in 'ab'}

  def learned(kinds, turns):
    optimizer = optimizer_of(kinds, used, params, optimizer__name=name)
    state = states.init_fn(variables, optimizer, 0, False)()
    steps = [jax.jit(make_train_step(
        Matrices(), {task: Regression() for task in kind.tasks}, WEIGHTS, optimizer,
        resting=resting.resting(kind, used, params, frozenset()))) for kind in kinds]
    for number, kind in enumerate(turns):
      if kind is not None:
        state, _ = steps[kind](state, batch_of_two(kinds[kind].tasks, number))
    return flat(state.params)

  both = learned((StepKind(('a',)), StepKind(('b',))), [0, 0, 0, 0, 1, 0, 1, 1])
  for task, turns in (('a', [0, 0, 0, 0, None, 0, None, None]),
                      ('b', [None] * 4 + [0, None, 0, 0])):
    alone = learned((StepKind((task,)),), turns)
    for path in used[task]:
      np.testing.assert_allclose(both[path], alone[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_turns_that_match_nothing_are_one_line():
  params = jax.eval_shape(states.variables_fn(Heads(), batch_of(), 0))['params']
  with pytest.raises(UserError, match="'towre' matches no parameter .* begin with fused/bias"):
    resting.resting(StepKind(TASKS, 'towre'), USED, params, frozenset())
  with pytest.raises(UserError, match="'tower' matches no parameter that is trained"):
    resting.resting(StepKind(TASKS, 'tower'), USED, params, USED['c'])


@pytest.mark.parametrize('name', ['uncertainty', 'gradnorm', 'famo'])
def test_micro_batches_weigh_tasks_as_the_large_batch_does(name):
  state, whole = start(name)
  _, micro = start(name, accumulation=4)
  for seed in range(3):
    expected, metrics = whole(state, batch_of(seed=seed))
    found, of_micro = micro(state, batch_of(seed=seed))
    assert_close((found.params, found.mixer), (expected.params, expected.mixer))
    assert_close(of_micro, metrics)
    state = expected


@pytest.mark.parametrize('name', ['uncertainty', 'gradnorm', 'famo'])
def test_a_gradient_that_is_not_finite_leaves_the_balance_as_it_was(name):
  state, step = start(name)
  state, _ = step(state, batch_of())
  assert jax.tree.leaves(state.mixer)
  bad = batch_of()
  bad['b']['b']['y'][0] = np.inf
  new, _ = step(state, bad)
  assert new.skipped == 1
  assert_same((new.mixer, new.params), (state.mixer, state.params))
  after, _ = step(new, batch_of(seed=1))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.mixer))


def test_norms_and_cosines_are_those_of_the_gradients():
  state, step = start('gradnorm')
  batch = batch_of()
  measure = make_measure(Heads(), {task: Regression() for task in TASKS}, WEIGHTS, shared=SHARED)
  measured = jax.jit(measure)(state, batch)
  vectors = {task: np.concatenate([grad[name].ravel() for name in sorted(SHARED)])
             for task in TASKS for grad in [task_gradient(state.params, batch, task)]}
  for task in TASKS:
    assert measured[f'{task}/gradient_norm'] == pytest.approx(
        np.linalg.norm(vectors[task]), rel=1e-4)
  for one, other in itertools.combinations(TASKS, 2):
    cosine = vectors[one] @ vectors[other] / np.linalg.norm(vectors[one]) / np.linalg.norm(
        vectors[other])
    assert measured[f'cosine_{one}_{other}'] == pytest.approx(cosine, abs=1e-5)
  _, metrics = step(state, batch)
  for key, value in measured.items():  # gradient-based balances log them too
    assert metrics[key] == pytest.approx(float(value), rel=1e-5)
