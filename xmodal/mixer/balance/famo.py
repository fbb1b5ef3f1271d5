"""FAMO: weights under which all log losses fall at set rates."""

import jax
import jax.numpy as jnp
import numpy as np

from xmodal.mixer.balance import adam
from xmodal.mixer.balance.balance import BALANCES, Balance


@BALANCES.register('famo', options={'balance_rate': adam.RATE})
class Famo(Balance):
  """Makes log losses fall at rates proportional to c (FAMO, Liu et al., arXiv:2306.03792).

  The paper's rule, applied to loss^(1/c): the gradient is that of the sum of z log(loss) / c, where
  z = softmax(xi) is initially proportional to c^2, which gives each task the weight c / loss.
  Weights are scaled so that without c they sum to the number of tasks. xi learns from the fall of
  each log(loss) / c, by Adam with decay towards its initial value. The paper measures that fall
  with a second forward pass of the same batch. Here it is estimated from the task's next batch,
  which costs nothing; it is exact only if consecutive batches are equal. All weights are 1 until
  each task has had a step.
  """

  needs = 'losses'
  _DECAY = 1e-3

  def __init__(self, tasks, task_weights, balance_rate: float):
    super().__init__(tasks, task_weights)
    self._rate = balance_rate

  def init(self):
    # logit: xi minus its initial value.
    return self._zeros('logit', 'last', 'fall', 'seen', *adam.STATE)

  def _weights(self, state, losses, active, gram, rng):
    logit = jnp.where(active, self._moved(state, losses, active)['logit'], state['logit'])
    losses = jnp.where(active, losses, state['last']) / self._task_weights
    raw = self._shares(logit) / self._task_weights ** 2 / (losses + adam.EPS)
    return jnp.where((active | (state['seen'] > 0)).all(), len(self.tasks) * raw / raw.sum(), 1)

  def _update(self, state, losses, active, gram):
    return {**self._moved(state, losses, active), 'last': losses, 'seen': state['seen'] + 1}

  def _moved(self, state, losses, active):
    again = active & (state['seen'] > 0)
    fall = jnp.where(again, jnp.log(state['last'] + adam.EPS) - jnp.log(losses + adam.EPS),
                     state['fall'])
    share, pace = self._shares(state['logit']), fall / self._task_weights
    gradient = share * (pace - (share * pace).sum()) + self._DECAY * state['logit']
    change, moments = adam.adam(state, gradient, self._rate)
    moved = {'logit': state['logit'] + change, 'fall': fall, **moments}
    return {name: jnp.where(again, x, state[name]) for name, x in moved.items()}

  def _shares(self, logit):
    return jax.nn.softmax(logit + 2 * np.log(self._task_weights))
