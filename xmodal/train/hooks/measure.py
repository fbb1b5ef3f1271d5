"""Measures agreement between tasks: norms and cosines of their gradients."""

import jax

from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan
from xmodal.train.programs import compile_measure


class Measuring:
  """Measures task agreement every config.mixer.measure_every steps."""

  def __init__(self, plan: Plan, start: int):
    """Compiles the measurement if a step after `start` needs it."""
    train, self._every = plan.config.train, plan.config.mixer.measure_every
    self._plan, self._tasks = plan, tuple(plan.tasks)
    # Balances that need gradients log them at every step.
    self._measure = None
    if (len(self._tasks) > 1 and self._every and plan.balance.needs != 'gradients'
        and start // self._every < train.steps // self._every):
      self._measure = compile_measure(plan)

  def __call__(self, step: int, state, batch) -> dict[str, jax.Array]:
    """Measures before a step (counted from 1), on its batch or a batch of all tasks.

    Returns {} for steps without a measurement.
    """
    if self._measure is None or step % self._every:
      return {}
    plan, sampling, size = self._plan, self._plan.sampling, self._plan.config.train.batch_size
    if sampling.kinds[sampling.kind(step - 1)].tasks != self._tasks:
      rows = meshes.local_rows(plan.mesh, size)
      batch = meshes.put_batch(
          plan.stream('train').at(self._tasks, sampling, step - 1, size, rows), plan.mesh, size)
    return self._measure(state, batch)
