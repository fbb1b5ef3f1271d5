"""Agreement between tasks: norms and cosines of their gradients at shared parameters.

A separate function computes them, so steps without a measurement have no extra cost.
"""

from collections.abc import Callable, Mapping, Set
import itertools

import jax
import jax.numpy as jnp

from xmodal.options import Option
from xmodal.tasks.task import Task
from xmodal.train.steps.frozen import join, split
from xmodal.train.steps.gradients import at_step, make_gradients, products

OPTIONS = {'measure_every': Option(100, 'Steps between measurements of the norms and cosines of '
                                   "the tasks' gradients; 0: never.", low=0, may_change=True)}


def compared(tasks, gram: jax.Array) -> dict[str, jax.Array]:
  """Gradient norm of each task, and cosine of each pair of tasks."""
  tasks = tuple(tasks)
  norms = jnp.sqrt(jnp.diagonal(gram))
  return {f'{name}/gradient_norm': norms[i] for i, name in enumerate(tasks)} | {
      f'cosine_{tasks[i]}_{tasks[j]}': gram[i, j] / jnp.maximum(norms[i] * norms[j], 1e-30)
      for i, j in itertools.combinations(range(len(tasks)), 2)}


def make_measure(model, tasks: Mapping[str, Task], task_weights: Mapping[str, float], *,
                 accumulation: int = 1, frozen: Set[str] = frozenset(),
                 shared: Set[str] = frozenset()) -> Callable:
  """A pure function (state, batch) -> metrics: norms and cosines of the tasks' gradients.

  The gradients are at shared parameters, and multiplied by task_weights.
  """
  gradients = make_gradients(model, tasks, task_weights, accumulation=accumulation, separate=True)

  def measure(state, batch):
    batch = at_step(batch, state.step)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    trained, fixed = split(state.params, frozen)
    at, others = split(trained, shared)[::-1]
    grads, *_ = gradients(at, join(others, fixed), state.collections, batch, rng)
    grads = {name: grads[name] for name in tasks}
    return compared(grads, products(grads, shared))

  return measure
