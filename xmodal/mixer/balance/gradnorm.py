"""GradNorm: weights that match gradient norms to each task's training rate."""

import jax.numpy as jnp

from xmodal.mixer.balance import adam
from xmodal.mixer.balance.balance import BALANCES, Balance
from xmodal.options import Option


@BALANCES.register('gradnorm', options={
    'balance_rate': adam.RATE,
    'gradnorm_alpha': Option(1.5, 'Strength of the correction for slow tasks.', low=0)})
class GradNorm(Balance):
  """Matches gradient norms to each task's training rate (Chen et al., arXiv:1711.02257).

  Adam updates the weights w so that the norms G = w |gradient of the loss| at the shared
  parameters approach mean(G) r^alpha, a constant target, where r is loss / first loss divided by
  its mean over tasks. The weights are then scaled to sum K. The loss excludes c.
  """

  needs = 'gradients'
  _LOWEST = 1e-3  # a negative weight would maximise the loss

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
