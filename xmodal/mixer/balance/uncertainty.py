"""Uncertainty weighting: weights from a learned noise level per task."""

import math

import jax.numpy as jnp

from xmodal.mixer.balance import adam
from xmodal.mixer.balance.balance import BALANCES, Balance


@BALANCES.register('uncertainty', options={'balance_rate': adam.RATE})
class Uncertainty(Balance):
  """Learns a noise level per task (Kendall et al., arXiv:1705.07115).

  The step minimises the sum of c (exp(-s) loss + s), which for c = 1 is the objective of the
  authors' code; Adam updates s. Weights exp(-s) are clipped to 0.1..10: the weight of a task
  whose loss reaches 0 would otherwise grow without limit.
  """

  def __init__(self, tasks, task_weights, balance_rate: float):
    super().__init__(tasks, task_weights)
    self._rate = balance_rate

  def init(self):
    return self._zeros('log_variance', *adam.STATE)

  def _weights(self, state, losses, active, gram, rng):
    return jnp.exp(-state['log_variance'])

  def _update(self, state, losses, active, gram):
    # Without c, which Adam would normalise away.
    gradient = 1 - jnp.exp(-state['log_variance']) * (losses / self._task_weights)
    change, moments = adam.adam(state, gradient, self._rate)
    bound = math.log(10)
    return {'log_variance': jnp.clip(state['log_variance'] + change, -bound, bound), **moments}
