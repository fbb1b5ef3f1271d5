"""How far tasks pull the same way: norms and cosines of their gradients at shared parameters.

Looked at every so many steps by a function of its own, so that other steps cost nothing.
"""

from collections.abc import Callable, Mapping, Set
import itertools

import jax
import jax.numpy as jnp

from xmodal.options import Option
from xmodal.sharding import mesh as meshes
from xmodal.tasks.task import Task
from xmodal.train.frozen import join, split
from xmodal.train.gradients import at_step, make_gradients, products

OPTIONS = {'measure_every': Option(100, 'Steps between measurements of the norms and cosines of the '
                                   "tasks' gradients; 0: never.", low=0, may_change=True)}


def compared(tasks, gram: jax.Array) -> dict[str, jax.Array]:
  """The numbers people look at: each task's gradient norm, and the cosine of each pair."""
  tasks = tuple(tasks)
  norms = jnp.sqrt(jnp.diagonal(gram))
  return {f'{name}/gradient_norm': norms[i] for i, name in enumerate(tasks)} | {
      f'cosine_{tasks[i]}_{tasks[j]}': gram[i, j] / jnp.maximum(norms[i] * norms[j], 1e-30)
      for i, j in itertools.combinations(range(len(tasks)), 2)}


def make_measure(model, tasks: Mapping[str, Task], task_weights: Mapping[str, float], *,
                 accumulation: int = 1, frozen: Set[str] = frozenset(),
                 shared: Set[str] = frozenset()) -> Callable:
  """A pure function (state, batch) -> metrics: norms and cosines of the tasks' gradients, each
  times its task_weight, at shared parameters; changes nothing."""
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


class Measuring:
  """Measures a run every config.mixer.measure_every steps."""

  def __init__(self, run, start: int):
    """Compiles, if a step of the train.loop.Run after `start` is to be measured."""
    train, self._every = run.config.train, run.config.mixer.measure_every
    self._run, self._tasks = run, tuple(run.tasks)
    # Balances that look at gradients tell of them at every step.
    self._measure = None
    if (len(self._tasks) > 1 and self._every and run.balance.needs != 'gradients'
        and start // self._every < train.steps // self._every):
      self._measure = run.compile_measure()

  def __call__(self, step: int, state, batch) -> dict[str, jax.Array]:
    """What is measured before a step (counted from 1) with its batch, or one of all tasks; {} at
    most steps."""
    if self._measure is None or step % self._every:
      return {}
    run, sampling, size = self._run, self._run.sampling, self._run.config.train.batch_size
    if sampling.kinds[sampling.kind(step - 1)].tasks != self._tasks:
      rows = meshes.local_rows(run.mesh, size)
      batch = meshes.put_batch(
          run.stream('train').at(self._tasks, sampling, step - 1, size, rows), run.mesh, size)
    return self._measure(state, batch)
