"""Balances of losses against the papers' toy problem and independent implementations in torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch

from xmodal.errors import UserError
from xmodal.mixer.balance.balance import make_balance
from xmodal.mixer.balance.pcgrad import project

TASKS = ('vqa', 'objects', 'detection')


def balance(name, tasks=TASKS, task_weights=None, **values):
  return make_balance(
      tiny.changed(mixer__tasks=tasks, mixer__balance=name,
                   mixer__weights=task_weights or (1.0,) * len(tasks), **values), every_step=True)


def named(values, tasks=TASKS):
  return dict(zip(tasks, map(jnp.float32, values)))


def as_array(weights):
  return np.array([float(weights[task]) for task in TASKS])


def follow(rule, losses, grams=None):
  """The weights of each step [T, K], for losses [T, K] and gradient products [T, K, K]."""

  @jax.jit
  def step(state, values, gram):
    values = dict(zip(rule.tasks, values))
    return rule.weights(state, values, gram), rule.update(state, values, gram)

  state, seen = rule.init(), []
  for number, values in enumerate(np.asarray(losses, np.float32)):
    weights, state = step(state, values, None if grams is None else grams[number])
    seen.append(as_array(weights))
  return np.array(seen)


# The toy problem of PCGrad, CAGrad (arXiv:2110.14048, appendix) and FAMO: two conflicting losses,
# on which plain descent gets stuck. In FAMO's version the first is a tenth as large.

LOWEST = np.array([-2.1, -21.0])  # lower bounds, as in FAMO's experiment
STARTS = np.array([[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]], np.float32)


def toy(x, np=jnp):
  """Both losses [2] at a point x [2]; np=torch computes with torch."""
  a, b = x[0], x[1]
  zero = 0 * b
  up, down = np.maximum(np.tanh(b / 2), zero), np.maximum(np.tanh(-b / 2), zero)
  valleys = [np.log(np.maximum(np.abs(inside), zero + 5e-6)) + 6 for inside in (
      (-a - 7) / 2 - np.tanh(-b), (-a + 3) / 2 + np.tanh(-b) + 2)]
  bowls = [((-a + side) ** 2 + (-b - 8) ** 2 / 10) / 10 - 20 for side in (7, -7)]
  first, second = (v * up + bowl * down for v, bowl in zip(valleys, bowls))
  return np.stack([first / 10, second])


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def descend(rule, starts, steps, task_weights=(1.0, 1.0)):
  """Adam from each start: end points [N, 2] and trajectories [N, T, 2]."""
  adam = optax.adam(1e-2)

  def from_one(start):
    def step(carry, key):
      x, state, moments = carry
      losses, pullback = jax.vjp(lambda x: jnp.array(task_weights) * (toy(x) - LOWEST), x)
      grads = jax.vmap(lambda row: pullback(row)[0])(jnp.eye(2))
      gram, losses = grads @ grads.T, dict(zip(rule.tasks, losses))
      weights = rule.weights(state, losses, gram, key)
      update, moments = adam.update(sum(w * g for w, g in zip(weights.values(), grads)), moments)
      return (x + update, rule.update(state, losses, gram), moments), x

    keys = jax.random.split(jax.random.key(0), steps)
    (x, *_), way = jax.lax.scan(step, (start, rule.init(), adam.init(start)), keys)
    return x, way

  return jax.vmap(from_one)(starts)


def test_famo_comes_to_where_neither_loss_can_fall_alone_and_sooner_than_the_sum():
  """The Pareto set has b = -8.4 and a in -7..7 (the bowls, where tanh(b / 2) is -1)."""
  ways = {name: np.asarray(descend(balance(name, TASKS[:2]), STARTS, 15_000)[1])
          for name in ('fixed', 'famo')}
  ends = ways['famo'][:, -1]
  assert (np.abs(ends[:, 1] + 8.4) < 0.1).all() and (np.abs(ends[:, 0]) < 7).all()
  # From (9, 9) the sum gets stuck in the valley of one loss, along which the other hardly falls.
  assert ways['fixed'][2, 5000, 1] > 1 > -2 > ways['famo'][2, 5000, 1]


@pytest.mark.parametrize('task_weights', [(1.0, 1.0), (3.0, 1.0)], ids=str)
def test_famo_goes_the_way_of_the_paper(task_weights):
  """Its second forward pass is on the next step's batch; here there is only one batch.

  With weights c the losses are loss^(1/c), and initial shares are proportional to c^2.
  """
  c = torch.tensor(task_weights)
  x = torch.tensor(STARTS[3], requires_grad=True)
  logits = torch.zeros(2, requires_grad=True)
  of_x = torch.optim.Adam([x], lr=1e-2)
  of_logits = torch.optim.Adam([logits], lr=0.025, weight_decay=1e-3)
  lowest, way = torch.tensor(LOWEST, dtype=torch.float32), []

  def shares():
    return torch.softmax(logits + 2 * c.log(), 0)

  for _ in range(300):
    way.append(x.detach().numpy().copy())
    losses = (toy(x, torch) - lowest) ** (1 / c)
    share = shares().detach()
    of_x.zero_grad()
    # K scale sum_i z_i log(loss_i), where scale makes the weights without c add up to K.
    scale = 2 / (share / c ** 2 / (toy(x, torch) - lowest)).sum().detach()
    (scale * (share * losses.log()).sum()).backward()
    of_x.step()
    fall = losses.log().detach() - ((toy(x, torch) - lowest) ** (1 / c)).log().detach()
    of_logits.zero_grad()
    (shares() * fall).sum().backward()
    of_logits.step()
  rule = balance('famo', TASKS[:2], task_weights)
  _, ours = descend(rule, STARTS[3:4], 300, task_weights)
  assert np.abs(way[-1] - way[0]).max() > 0.5
  np.testing.assert_allclose(ours[0], way, atol=2e-3)


# Each rule alone


def test_pcgrad_is_the_algorithm_of_the_paper_for_the_same_orders():
  rng = np.random.default_rng(0)
  opposed = 0
  for _ in range(20):
    grads = rng.normal(size=(4, 6)).astype(np.float32) + 0.2
    orders = np.array([rng.permutation(4) for _ in range(4)])
    expected = []
    for i in range(4):
      grad = grads[i].copy()
      for j in orders[i]:
        if j != i and (product := grad @ grads[j]) < 0:
          grad -= product / (grads[j] @ grads[j]) * grads[j]
          opposed += 1
      expected.append(grad)
    shares = project(jnp.array(grads @ grads.T), jnp.array(orders))
    np.testing.assert_allclose(shares @ grads, expected, rtol=1e-3, atol=1e-4)
  assert opposed > 20


def test_pcgrad_takes_the_tasks_in_another_order_each_time():
  grads = np.array([[1, 0, 0], [-0.9, 1, 0], [-0.8, -0.9, 1]], np.float32)
  rule = balance('pcgrad')
  seen = {tuple(as_array(rule.weights({}, named([1, 1, 1]), grads @ grads.T, jax.random.key(i))))
          for i in range(20)}
  assert len(seen) > 2


def test_gradnorm_is_that_of_torch():
  rng = np.random.default_rng(0)
  shared = torch.tensor(rng.normal(size=(5, 3)), requires_grad=True)
  goals = torch.tensor(rng.normal(size=(3, 5)))
  scales = torch.tensor([1.0, 20.0, 0.2])
  weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
  adam = torch.optim.Adam([weights], lr=0.025)
  losses, grams, expected, first = [], [], [], None
  for _ in range(30):
    of_task = scales * ((shared.T - goals) ** 2).sum(1)
    grads = [torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in of_task]
    losses.append(of_task.detach().numpy())
    grams.append([[float((a * b).sum()) for a in grads] for b in grads])
    expected.append(weights.detach().numpy().copy())
    first = of_task.detach() if first is None else first
    norms = torch.stack([(weight * loss).unsqueeze(0) for weight, loss in zip(weights, of_task)])
    norms = torch.stack([torch.autograd.grad(n.sum(), shared, create_graph=True)[0].norm()
                         for n in norms])
    rate = of_task.detach() / first
    target = (norms.mean() * (rate / rate.mean()) ** 1.5).detach()
    adam.zero_grad()
    (norms - target).abs().sum().backward(inputs=[weights])
    adam.step()
    with torch.no_grad():
      weights *= 3 / weights.sum()
      shared -= 0.01 * sum(w * g for w, g in zip(weights, grads))
  found = follow(balance('gradnorm'), losses, np.asarray(grams, np.float32))
  assert expected[-1].max() > 1.5
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_uncertainty_is_that_of_torch():
  rng = np.random.default_rng(0)
  losses = np.exp(rng.normal(size=(60, 3)) * 0.3 + [0.5, -1, 0])
  log_variance = torch.zeros(3, requires_grad=True)
  adam, expected = torch.optim.Adam([log_variance], lr=0.025), []
  for of_step in torch.tensor(losses):
    expected.append(torch.exp(-log_variance.detach()).numpy())
    adam.zero_grad()
    (torch.exp(-log_variance) * of_step + log_variance).sum().backward()
    adam.step()
  np.testing.assert_allclose(follow(balance('uncertainty'), losses), expected, rtol=1e-4)


def test_an_easy_loss_does_not_run_away_with_uncertainty():
  weights = follow(balance('uncertainty'), np.tile([1e-6, 1.0, 1e6], (300, 1)))
  np.testing.assert_allclose(weights[-1], [10, 1, 0.1], rtol=1e-4)


def test_dwa_compares_the_last_two_windows():
  rng = np.random.default_rng(0)
  losses = rng.random((14, 3)) + 0.5
  found = follow(balance('dwa', mixer__dwa_window=4), losses)
  np.testing.assert_allclose(found[:8], 1, rtol=1e-6)
  for step in range(8, 14):
    last = step // 4 * 4
    ratio = losses[last - 4:last].mean(0) / losses[last - 8:last - 4].mean(0)
    np.testing.assert_allclose(found[step], 3 * np.exp(ratio / 2) / np.exp(ratio / 2).sum(),
                               rtol=1e-5)


# The effect of config.mixer.weights on each


@pytest.mark.parametrize('name', ['fixed', 'uncertainty', 'dwa', 'gradnorm', 'pcgrad', 'famo'])
def test_twice_the_weight_of_a_task_is_twice_its_gradient(name):
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(3, 6)).astype(np.float32)
  grads[0] -= grads[1]  # so that they conflict
  losses, key = np.array([0.7, 2.0, 0.1], np.float32), jax.random.key(0)
  totals = []
  for task_weights in ((1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 3.0, 1.0)):
    rule = balance(name, task_weights=task_weights, mixer__dwa_window=1)
    weighted = np.array(task_weights, np.float32)[:, None] * grads
    of_step, gram = named(np.array(task_weights) * losses), weighted @ weighted.T
    state = rule.update(rule.init(), of_step, gram) if name in ('famo', 'dwa') else rule.init()
    weights = as_array(rule.weights(state, of_step, gram, key))
    totals.append(weights @ weighted)
  once, twice, thrice = totals
  assert np.abs(twice - once).max() > 0.1
  np.testing.assert_allclose(thrice - twice, twice - once, rtol=1e-4, atol=1e-5)
  if name != 'pcgrad':  # which projects out components
    np.testing.assert_allclose(twice - once, as_array(balance(name).weights(
        balance(name).init(), named(losses), grads @ grads.T, key))[1] * grads[1]
                               if name != 'famo' else 3 / losses[1] / (1 / losses).sum() * grads[1],
                               rtol=1e-4, atol=1e-5)


def test_uncertainty_learns_the_same_noise_whatever_a_task_weighs():
  """At the optimum of Kendall et al., exp(-s) = 1 / loss."""
  losses = np.tile([0.5, 2.0, 1.0], (800, 1))
  for task_weights in ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0)):
    found = follow(balance('uncertainty', task_weights=task_weights), losses * task_weights)
    np.testing.assert_allclose(found[-1], [2, 0.5, 1], rtol=0.02)


def test_gradnorm_brings_gradient_norms_to_the_weights():
  task_weights, norms = np.array([4.0, 1.0, 1.0]), np.array([1.0, 5.0, 0.3])
  weighted = task_weights * norms
  found = follow(balance('gradnorm', task_weights=tuple(task_weights), mixer__balance_rate=0.01),
                 np.tile(task_weights, (1500, 1)), np.tile(np.diag(weighted ** 2), (1500, 1, 1)))
  after = found[-200:].mean(0) * weighted
  np.testing.assert_allclose(after / after.sum(), task_weights / 6, rtol=0.03)


def test_famo_makes_log_losses_fall_as_tasks_weigh():
  """Losses exp(80 - s x), each with its own x; with equal weights the first falls four times as
  fast. All steps have the same length, as with Adam."""
  speed, task_weights = np.array([2.0, 1.0]), np.array([1.0, 2.0])
  rule = balance('famo', TASKS[:2], tuple(task_weights))
  step = jax.jit(lambda state, losses: (rule.weights(state, losses), rule.update(state, losses)))
  state, logs, falls = rule.init(), np.array([80.0, 80.0]), []
  for _ in range(90):
    losses = task_weights * np.exp(logs)
    weights, state = step(state, named(losses, TASKS[:2]))
    fall = [float(weights[task]) for task in TASKS[:2]] * losses * speed ** 2
    falls.append(fall / fall.sum())
    logs = logs - falls[-1]
  first, last = falls[1], np.mean(falls[-30:], axis=0)
  assert first[1] < first[0] and last[1] / last[0] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize('name', ['uncertainty', 'dwa', 'famo'])
def test_a_step_of_one_task_changes_its_entries_alone(name):
  rule = balance(name, mixer__dwa_window=1)
  state = rule.init()
  for i, task in enumerate(3 * TASKS):
    old, losses = state, {task: jnp.float32(2.0 / (1 + i))}
    weights, state = rule.weights(old, losses), rule.update(old, losses)
    assert weights.keys() == {task} and np.isfinite(float(weights[task]))
    own = TASKS.index(task)
    for key in old:
      np.testing.assert_array_equal(np.delete(state[key], own), np.delete(old[key], own))
    assert any(state[key][own] != old[key][own] for key in old)


def test_famo_in_turns_pulls_the_task_that_does_not_get_better():
  rule, state = balance('famo'), balance('famo').init()
  for i in range(60):
    for task, loss in zip(TASKS, (0.9 ** i, 1.0, 0.8 ** i)):
      state = rule.update(state, {task: jnp.float32(loss)})
  assert np.argmax(state['logit']) == 1 and np.argmin(state['logit']) == 2


@pytest.mark.parametrize('values, every_step, words', [
    ({'mixer__balance': 'equal'}, True, "no balance 'equal'; wanted one of dwa, famo, fixed"),
    ({'mixer__balance': 'pcgrad', 'mixer__sampling': 'round_robin'}, False, "to 'joint'"),
    ({'mixer__balance': 'gradnorm', 'mixer__sampling': 'proportional'}, False, 'proportional')])
def test_a_balance_that_cannot_be_is_one_line(values, every_step, words):
  with pytest.raises(UserError, match=words) as error:
    make_balance(tiny.changed(**values), every_step)
  assert '\n' not in str(error.value)
