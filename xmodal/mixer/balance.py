"""Weight of each task's loss in a step: rules that learn it from losses or gradients.

A balance is a few pure functions. Its state is a dict of arrays [K], one entry a
task: part of the train state and of its checkpoints. In a step that trains some
of the tasks the entries of the others stay as they are.

config.mixer.weights, c, keep their meaning under each rule. At the same state of
the rule, twice the c of a task is twice its gradient in the sum. What a rule
then settles at:

- fixed: the minimum of sum c_i L_i.
- uncertainty: the minimum of sum c_i (exp(-s_i) L_i + s_i), so the c of a task does not change its
  noise s_i.
- dwa: c_i times the weight of the paper, which looks at ratios of losses.
- gradnorm: the gradient norms of the shared parameters are as c_i (loss / first loss)^alpha.
- pcgrad: sum of c_i times the projected gradient of task i; what is projected out does not depend
  on the c of the others.
- famo: log losses that fall in proportion to c_i.

All losses and products of gradients that a rule is given are those of c_i L_i.
"""

from collections.abc import Mapping, Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError

_B1, _B2, _EPS = 0.9, 0.999, 1e-8  # of Adam (arXiv:1412.6980), as the papers take it


class Balance:
  """config.mixer.weights as they are; the base of all others.

  Attributes:
    tasks: their names, in the order of the state's entries.
    needs: what `weights` looks at beside the state: '', 'losses', or 'gradients' (the products
      of the gradients of all tasks).
    of_shared: if true, weights apply to the gradients of shared parameters only, and say what is
      left of each: task-specific parameters receive the unweighted gradient, and the objective is
      the plain sum of the losses.
  """

  needs = ''
  of_shared = False

  def __init__(self, tasks: Sequence[str], task_weights: Sequence[float] | None = None):
    """task_weights: what the losses that it will be given are multiplied by; None: 1."""
    self.tasks = tuple(tasks)
    self._task_weights = np.array(task_weights or [1.0] * len(self.tasks), np.float32)

  def init(self) -> dict[str, jax.Array]:
    """The state before the first step; {} if there is none."""
    return {}

  def weights(self, state: Mapping, losses: Mapping[str, jax.Array],
              gram: jax.Array | None = None, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """Weight of each task's gradient in this step, beside its c.

    Args:
      state: as it is before the step.
      losses: float32 scalars c_i L_i of the tasks in the step.
      gram: float32 [K, K], products of the gradients of those, of shared parameters.
      rng: key of the step.

    Returns:
      float32 scalars of the tasks in the step.
    """
    weights = self._weights(state, *self._arrays(losses), gram, rng)
    return {task: weights[i] for i, task in enumerate(self.tasks) if task in losses}

  def update(self, state: Mapping, losses: Mapping[str, jax.Array],
             gram: jax.Array | None = None) -> dict[str, jax.Array]:
    """The state after the step."""
    values, active = self._arrays(losses)
    new = self._update(state, values, active, gram)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, dict(state))

  def _arrays(self, losses):
    """Losses [K], 0 for tasks that are not in the step, and which are, bool [K]."""
    return (jnp.stack([jnp.asarray(losses.get(task, 0.0), jnp.float32) for task in self.tasks]),
            np.array([task in losses for task in self.tasks]))

  def _weights(self, state, losses, active, gram, rng):
    return jnp.ones(len(self.tasks))

  def _update(self, state, losses, active, gram):
    return dict(state)

  def _zeros(self, *names):
    return {name: jnp.zeros(len(self.tasks)) for name in names}


class Uncertainty(Balance):
  """A learned noise of each task (Kendall et al., arXiv:1705.07115).

  The step minimises the sum of c (exp(-s) loss + s), with c = 1 as the authors' code does; s has
  Adam of its own. Weights exp(-s) stay in 0.1..10: what is learned to the end would count ever
  more.
  """

  def __init__(self, tasks, task_weights, rate: float):
    super().__init__(tasks, task_weights)
    self._rate = rate

  def init(self):
    return self._zeros('log_variance', *_ADAM)

  def _weights(self, state, losses, active, gram, rng):
    return jnp.exp(-state['log_variance'])

  def _update(self, state, losses, active, gram):
    # Without c, which Adam would divide out.
    gradient = 1 - jnp.exp(-state['log_variance']) * (losses / self._task_weights)
    change, moments = _adam(state, gradient, self._rate)
    bound = math.log(10)
    return {'log_variance': jnp.clip(state['log_variance'] + change, -bound, bound), **moments}


class DynamicWeightAverage(Balance):
  """What falls slowest counts most (DWA, Liu et al., arXiv:1803.10704).

  w = K softmax(r / 2) with r the ratio of the mean losses of the last two windows of a task's
  steps, where the paper has epochs; 1 until all tasks have had two.
  """

  _TEMPERATURE = 2.0

  def __init__(self, tasks, task_weights, window: int):
    super().__init__(tasks, task_weights)
    self._window = window

  def init(self):
    return self._zeros('sum', 'count', 'last', 'before')

  def _weights(self, state, losses, active, gram, rng):
    ready = (state['before'] > 0).all()
    ratio = jnp.where(ready, state['last'] / jnp.where(ready, state['before'], 1), 1)
    return len(self.tasks) * jax.nn.softmax(ratio / self._TEMPERATURE)

  def _update(self, state, losses, active, gram):
    total, count = state['sum'] + losses, state['count'] + 1
    full = count == self._window
    return {'sum': jnp.where(full, 0, total), 'count': jnp.where(full, 0, count),
            'last': jnp.where(full, total / self._window, state['last']),
            'before': jnp.where(full, state['last'], state['before'])}


class GradNorm(Balance):
  """Gradient norms that fit how fast each task learns (Chen et al., arXiv:1711.02257).

  Weights w learn, by Adam, to bring the norms G = w |gradient of the loss| at the shared
  parameters to mean(G) r^alpha, held constant, where r is loss / first loss over its mean; then
  they are scaled to a sum of K. The loss is that without c.
  """

  needs = 'gradients'
  _LOWEST = 1e-3  # a weight below 0 would train backwards

  def __init__(self, tasks, task_weights, rate: float, alpha: float):
    super().__init__(tasks, task_weights)
    self._rate, self._alpha = rate, alpha

  def init(self):
    return {'weight': jnp.ones(len(self.tasks)), **self._zeros('first', *_ADAM)}

  def _weights(self, state, losses, active, gram, rng):
    return state['weight']

  def _update(self, state, losses, active, gram):
    first = jnp.where(state['count'] == 0, losses, state['first'])
    norms = jnp.sqrt(jnp.diagonal(gram)) / self._task_weights
    weighted = state['weight'] * norms
    rate = losses / jnp.maximum(first, _EPS)
    target = weighted.mean() * (rate / jnp.maximum(rate.mean(), _EPS)) ** self._alpha
    change, moments = _adam(state, jnp.sign(weighted - target) * norms, self._rate)
    weight = jnp.maximum(state['weight'] + change, self._LOWEST)
    return {'weight': weight * len(self.tasks) / weight.sum(), 'first': first, **moments}


class PCGrad(Balance):
  """No task's gradient against another's (Yu et al., arXiv:2001.06782).

  Of each task's gradient, what opposes another task's is projected out, one after the other in
  random order. The sum of what is left is a weighted sum of the gradients as they were, so that
  their products are all that it takes.
  """

  needs = 'gradients'
  of_shared = True

  def _weights(self, state, losses, active, gram, rng):
    count = len(self.tasks)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(rng, count))
    return project(gram, orders).sum(0)


def project(gram: jax.Array, orders: jax.Array) -> jax.Array:
  """Gradients without what opposes the others (PCGrad, algorithm 1).

  Args:
    gram: float32 [K, K], products of the gradients.
    orders: int [K, K], in which order each meets the others (and itself, which changes nothing).

  Returns:
    float32 [K, K]: row i has what gradient i is of all, as they were.
  """
  count = len(gram)
  left = jnp.eye(count)
  for i in range(count):
    for j in orders[i]:
      product = left[i] @ gram[:, j]
      opposed = (product < 0) & (j != i)
      left = left.at[i, j].add(jnp.where(opposed, -product / jnp.maximum(gram[j, j], 1e-30), 0))
  return left


class Famo(Balance):
  """All log losses fall at the pace of their c (FAMO, Liu et al., arXiv:2306.03792).

  The paper's rule, of loss^(1/c): the gradient is that of the sum of z log(loss) / c, where z =
  softmax(xi) begins in proportion to c^2, which gives each task c / loss. Scaled so that weights
  without c add up to the number of tasks. xi learns, by Adam with decay to where it began, from
  how much each log(loss) / c fell. The paper looks at that with a second forward pass of the
  same batch; here it is estimated from the task's next batch, which costs nothing; exact only if
  consecutive batches are equal. All weights are 1 until each task was seen.
  """

  needs = 'losses'
  _DECAY = 1e-3

  def __init__(self, tasks, task_weights, rate: float):
    super().__init__(tasks, task_weights)
    self._rate = rate

  def init(self):
    # logit: of xi, what it has moved from where it began.
    return self._zeros('logit', 'last', 'fall', 'seen', *_ADAM)

  def _weights(self, state, losses, active, gram, rng):
    logit = jnp.where(active, self._moved(state, losses, active)['logit'], state['logit'])
    losses = jnp.where(active, losses, state['last']) / self._task_weights
    raw = self._shares(logit) / self._task_weights ** 2 / (losses + _EPS)
    return jnp.where((active | (state['seen'] > 0)).all(), len(self.tasks) * raw / raw.sum(), 1)

  def _update(self, state, losses, active, gram):
    return {**self._moved(state, losses, active), 'last': losses, 'seen': state['seen'] + 1}

  def _moved(self, state, losses, active):
    again = active & (state['seen'] > 0)
    fall = jnp.where(again, jnp.log(state['last'] + _EPS) - jnp.log(losses + _EPS), state['fall'])
    share, pace = self._shares(state['logit']), fall / self._task_weights
    gradient = share * (pace - (share * pace).sum()) + self._DECAY * state['logit']
    change, moments = _adam(state, gradient, self._rate)
    moved = {'logit': state['logit'] + change, 'fall': fall, **moments}
    return {name: jnp.where(again, x, state[name]) for name, x in moved.items()}

  def _shares(self, logit):
    return jax.nn.softmax(logit + 2 * np.log(self._task_weights))


_ADAM = ('mean', 'square', 'count')


def _adam(state, gradient, rate):
  """The change that Adam makes, and its new state; each entry has a count of its own."""
  mean = _B1 * state['mean'] + (1 - _B1) * gradient
  square = _B2 * state['square'] + (1 - _B2) * gradient ** 2
  count = state['count'] + 1
  change = -rate * (mean / (1 - _B1 ** count)) / (jnp.sqrt(square / (1 - _B2 ** count)) + _EPS)
  return change, {'mean': mean, 'square': square, 'count': count}


def make_balance(config, every_step: bool) -> Balance:
  """The balance of config.mixer.

  Args:
    config: the whole config.
    every_step: whether each step trains all tasks.

  Raises:
    UserError: no such balance, or one that compares gradients where tasks do not meet.
  """
  mixer = config.mixer
  kinds = {
      'fixed': (Balance,), 'uncertainty': (Uncertainty, mixer.balance_rate),
      'dwa': (DynamicWeightAverage, mixer.dwa_window),
      'gradnorm': (GradNorm, mixer.balance_rate, mixer.gradnorm_alpha), 'pcgrad': (PCGrad,),
      'famo': (Famo, mixer.balance_rate)}
  if mixer.balance not in kinds:
    raise UserError(f'config.mixer.balance={mixer.balance!r}: wanted one of {", ".join(kinds)}')
  kind, *options = kinds[mixer.balance]
  balance = kind(mixer.tasks, mixer.weights, *options)
  if balance.needs == 'gradients' and not every_step:
    raise UserError(f'config.mixer.balance={mixer.balance!r} compares the gradients of all tasks '
                    f'in each step, and config.mixer.sampling={mixer.sampling!r} trains them '
                    "apart; set that to 'joint', or take uncertainty, dwa or famo")
  return balance
