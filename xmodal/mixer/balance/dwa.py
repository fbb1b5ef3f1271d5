"""Dynamic Weight Average: weights from the rate at which each loss falls."""

import jax
import jax.numpy as jnp

from xmodal.mixer.balance.balance import BALANCES, Balance
from xmodal.options import Option


@BALANCES.register('dwa', options={
    'dwa_window': Option(100, "Steps of a task per window; weights compare the mean losses of "
                         'consecutive windows.', low=1)})
class DynamicWeightAverage(Balance):
  """Tasks whose losses fall slowest get the highest weights (DWA, Liu et al., arXiv:1803.10704).

  w = K softmax(r / 2), with r the ratio of a task's mean losses in its last two windows of steps
  (the paper uses epochs). All weights are 1 until each task has completed two windows.
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
