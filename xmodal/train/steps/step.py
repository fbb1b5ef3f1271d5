"""The training step, shared by all tasks."""

from collections.abc import Callable, Mapping, Set

import jax
import jax.numpy as jnp
import optax

from xmodal.mixer.balance.balance import Balance
from xmodal.options import Option
from xmodal.tasks.task import Task
from xmodal.train.optimizer.optimizer import by_parameter
from xmodal.train.steps.frozen import join, split
from xmodal.train.steps.gradient_agreement import compared
from xmodal.train.steps.gradients import at_step, make_gradients, products, weighted_sum
from xmodal.train.steps.state import TrainState

OPTIONS = {
    'steps': Option(1000, 'Number of training steps.', low=1, may_change=True),
    'batch_size': Option(64, 'Examples per step, over all devices.', low=1),
    'accumulation': Option(1, 'Micro-batches per step: less memory, same result.', low=1),
    'ema_decay': Option(0.0, 'Decay of the moving average of the parameters; 0: none.', low=0,
                        high=0.999999)}


def make_train_step(model, tasks: Mapping[str, Task], task_weights: Mapping[str, float],
                    optimizer: optax.GradientTransformation, *, accumulation: int = 1,
                    ema_decay: float = 0.0, frozen: Set[str] = frozenset(),
                    balance: Balance | None = None, resting: Set[str] = frozenset(),
                    shared: Set[str] = frozenset(),
                    schedule: optax.Schedule | None = None, teacher=None) -> Callable:
  """A pure function (state, batch, taught_by) -> (state, metrics), to be compiled with jax.jit.

  Minimises the sum over tasks of weight * task_weight * loss, with weights from the balance; under
  PCGrad, the sum of task_weight * loss. That sum is the metric 'loss'.

  Args:
    model: a models.joint.MultiTask.
    tasks: the tasks of this step, by name.
    task_weights: weight of each task's loss.
    optimizer: the gradient transformation.
    accumulation: micro-batches whose gradients are summed; less memory, same result.
    ema_decay: decay of the moving average of the parameters; 0: none.
    frozen: paths of the parameters that never change; the optimizer covers the others.
    balance: balance of all tasks of the run, also of other steps; None: all weights are 1.
    resting: paths of the parameters that this step does not update although other steps do. Their
      moments and counters stay too, whereas a zero gradient would change them. PyTorch does the
      same for a gradient of None.
    shared: paths of the parameters at which task gradients are compared.
    schedule: the optimizer's learning rate by step, for the metric 'learning_rate'.
    teacher: a train.start.teacher.Teacher, whose variables are `taught_by`; None: none.

  Returns:
    The step. Its metrics are float32 scalars: 'loss', 'task/term' for each term, the task's
    progress metrics, with several tasks 'task/loss' and 'task/weight', 'gradient_norm' (before
    clipping), 'update_norm' (of what the step adds to the parameters) and 'parameter_norm' (after
    the step), all three over trained parameters, 'skipped', 'skipped_in_a_row' and, with a
    schedule, 'learning_rate'. A step whose loss or gradients are not finite changes the counters
    only.
  """
  balance = balance or Balance(tuple(tasks))
  # With several micro-batches the weights are known only after the last one.
  separate = balance.needs == 'gradients' or (balance.needs == 'losses' and accumulation > 1)
  gradients = make_gradients(model, tasks, task_weights, accumulation=accumulation,
                             separate=separate, teacher=teacher)

  def gradients_and_weights(mixer, moving, fixed, collections, batch, rng, taught_by):
    """(gradients, collections, losses, weights, products of gradients, metrics)"""
    if not separate:
      grads, collections, losses, metrics = gradients(
          moving, fixed, collections, batch, rng, lambda losses: balance.weights(mixer, losses),
          taught_by)
      return grads, collections, losses, balance.weights(mixer, losses), None, metrics
    grads, collections, losses, metrics = gradients(moving, fixed, collections, batch, rng,
                                                    taught_by=taught_by)
    grads = {name: grads[name] for name in balance.tasks if name in grads}
    gram = products(grads, shared) if balance.needs == 'gradients' else None
    weights = balance.weights(mixer, losses, gram, jax.random.fold_in(rng, 0))
    if gram is not None:
      metrics |= compared(grads, gram)
    total = weighted_sum(grads, weights)
    if balance.shared_only:
      whole = weighted_sum(grads, dict.fromkeys(grads, 1.0))
      total = join(split(total, shared)[1], split(whole, shared)[0])
    return total, collections, losses, weights, gram, metrics

  def train_step(state: TrainState, batch, taught_by=None):
    batch = at_step(batch, state.step)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    trained, fixed = split(state.params, frozen)
    moving, still = split(trained, resting)
    grads, collections, losses, weights, gram, metrics = gradients_and_weights(
        state.mixer, moving, join(still, fixed), state.collections, batch, rng, taught_by)
    if balance.shared_only:  # the weights apply to projected gradients, not to losses
      weights = dict.fromkeys(losses, 1.0)
    loss = sum(weights[name] * losses[name] for name in losses)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer.update(
        join(grads, jax.tree.map(jnp.zeros_like, still)), state.opt_state, trained)
    moved = optax.apply_updates(trained, updates)
    if resting:
      moved = join(split(moved, resting)[0], still)
      opt_state = _keep_resting(optimizer, opt_state, state.opt_state, trained, resting)
    ema = state.ema
    if ema is not None:
      # A lower decay in early steps, so that the average forgets the initial parameters.
      decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
      average, fixed_average = split(ema, frozen)
      average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, moved)
      ema = join(average, fixed_average)

    def keep(new, old):
      return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    skipped_in_a_row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    new = state.replace(
        step=state.step + 1, params=keep(join(moved, fixed), state.params),
        collections=keep(collections, state.collections),
        opt_state=keep(opt_state, state.opt_state), ema=keep(ema, state.ema),
        mixer=keep(balance.update(state.mixer, losses, gram), state.mixer),
        skipped=state.skipped + ~good, skipped_in_a_row=skipped_in_a_row)
    if len(balance.tasks) > 1:
      for name in losses:
        metrics[f'{name}/loss'] = losses[name] / task_weights[name]
        metrics[f'{name}/weight'] = weights[name] * task_weights[name]
    metrics |= {'loss': loss, 'gradient_norm': norm, 'skipped': new.skipped,
                'skipped_in_a_row': skipped_in_a_row}
    metrics['update_norm'] = jnp.where(good, optax.tree.norm(split(updates, resting)[0]), 0.0)
    metrics['parameter_norm'] = optax.tree.norm(split(new.params, frozen)[0])
    if schedule is not None:
      # The optimizer's own count, which a skipped step leaves.
      metrics['learning_rate'] = schedule(state.step - state.skipped)
    return new, metrics

  return train_step


def _keep_resting(optimizer, new, old, params, resting):
  """The new optimizer state, with the old state for resting parameters.

  A counter rests if all parameters of its state do: make_optimizer keeps a separate state for each
  group of parameters that rest together.
  """
  moving, still = split(params, resting)
  rests = join(jax.tree.map(lambda _: False, moving), jax.tree.map(lambda _: True, still))
  rests = by_parameter(optimizer, new, rests, None)

  def with_counter(rests):
    moments = jax.tree.leaves(rests)  # only those of parameters; other fields are None
    return rests._replace(count=bool(moments) and all(moments)) if _has_counter(rests) else rests

  rests = jax.tree.map(with_counter, rests, is_leaf=_has_counter)
  return jax.tree.map(lambda rest, a, b: b if rest else a, rests, new, old,
                      is_leaf=lambda x: x is None)


def _has_counter(state):
  return 'count' in getattr(state, '_fields', ())
