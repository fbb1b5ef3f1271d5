"""Weights from how fast losses fall."""

import jax
import jax.numpy as jnp

from xmodal.mixer.balance.balance import BALANCES, Balance
from xmodal.options import Option


@BALANCES.register('dwa', options={
    'dwa_window': Option(100, 'Steps of a task whose mean loss is compared with that of those '
                         'before.', low=1)})
class DynamicWeightAverage(Balance):
  """What falls slowest counts most (DWA, Liu et al., arXiv:1803.10704).

  w = K softmax(r / 2) with r the ratio of the mean losses of the last two windows of a task's
  steps, where the paper has epochs; 1 until all tasks have had two.
  """

  _TEMPERATURE = 2.0

  def __init__(self, tasks, task_weights, dwa_window: int):
    super().__init__(tasks, task_weights)
    self._window = dwa_window

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
