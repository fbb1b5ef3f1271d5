"""Adam (arXiv:1412.6980) for a balance's state, with a step count per task."""

import jax.numpy as jnp

from xmodal.options import Option

_B1, _B2, EPS = 0.9, 0.999, 1e-8  # as in the papers of the balances

RATE = Option(0.025, 'Learning rate of the weights of uncertainty, gradnorm and famo.', low=0)

STATE = ('mean', 'square', 'count')


def adam(state, gradient, rate):
  """Adam's update and its new state; each entry has its own step count."""
  mean = _B1 * state['mean'] + (1 - _B1) * gradient
  square = _B2 * state['square'] + (1 - _B2) * gradient ** 2
  count = state['count'] + 1
  change = -rate * (mean / (1 - _B1 ** count)) / (jnp.sqrt(square / (1 - _B2 ** count)) + EPS)
  return change, {'mean': mean, 'square': square, 'count': count}
