"""Weights that bring gradient norms to the pace of each task."""

import jax.numpy as jnp

from xmodal.mixer.balance import adam
from xmodal.mixer.balance.balance import BALANCES, Balance
from xmodal.options import Option


@BALANCES.register('gradnorm', options={
    'balance_rate': adam.RATE,
    'gradnorm_alpha': Option(1.5, 'How strongly tasks that learn slowly are pulled along.', low=0)})
class GradNorm(Balance):
  """Gradient norms that fit how fast each task learns (Chen et al., arXiv:1711.02257).

  Weights w learn, by Adam, to bring the norms G = w |gradient of the loss| at the shared
  parameters to mean(G) r^alpha, held constant, where r is loss / first loss over its mean; then
  they are scaled to a sum of K. The loss is that without c.
  """

  needs = 'gradients'
  _LOWEST = 1e-3  # a weight below 0 would train backwards

  def __init__(self, tasks, task_weights, balance_rate: float, gradnorm_alpha: float):
    super().__init__(tasks, task_weights)
    self._rate, self._alpha = balance_rate, gradnorm_alpha

  def init(self):
    return {'weight': jnp.ones(len(self.tasks)), **self._zeros('first', *adam.STATE)}

  def _weights(self, state, losses, active, gram, rng):
    return state['weight']

  def _update(self, state, losses, active, gram):
    first = jnp.where(state['count'] == 0, losses, state['first'])
    norms = jnp.sqrt(jnp.diagonal(gram)) / self._task_weights
    weighted = state['weight'] * norms
    rate = losses / jnp.maximum(first, adam.EPS)
    target = weighted.mean() * (rate / jnp.maximum(rate.mean(), adam.EPS)) ** self._alpha
    change, moments = adam.adam(state, jnp.sign(weighted - target) * norms, self._rate)
    weight = jnp.maximum(state['weight'] + change, self._LOWEST)
    return {'weight': weight * len(self.tasks) / weight.sum(), 'first': first, **moments}
