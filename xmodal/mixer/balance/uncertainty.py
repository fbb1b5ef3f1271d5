"""Weights from a learned noise of each task."""

import math

import jax.numpy as jnp

from xmodal.mixer.balance import adam
from xmodal.mixer.balance.balance import BALANCES, Balance


@BALANCES.register('uncertainty', options={'balance_rate': adam.RATE})
class Uncertainty(Balance):
  """A learned noise of each task (Kendall et al., arXiv:1705.07115).

  The step minimises the sum of c (exp(-s) loss + s), with c = 1 as the authors' code does; s has
  Adam of its own. Weights exp(-s) stay in 0.1..10: what is learned to the end would count ever
  more.
  """

  def __init__(self, tasks, task_weights, balance_rate: float):
    super().__init__(tasks, task_weights)
    self._rate = balance_rate

  def init(self):
    return self._zeros('log_variance', *adam.STATE)

  def _weights(self, state, losses, active, gram, rng):
    return jnp.exp(-state['log_variance'])

  def _update(self, state, losses, active, gram):
    # Without c, which Adam would divide out.
    gradient = 1 - jnp.exp(-state['log_variance']) * (losses / self._task_weights)
    change, moments = adam.adam(state, gradient, self._rate)
    bound = math.log(10)
    return {'log_variance': jnp.clip(state['log_variance'] + change, -bound, bound), **moments}
