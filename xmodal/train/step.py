"""The one training step that all tasks share."""

from collections.abc import Callable, Mapping, Set

import jax
import jax.numpy as jnp
import optax

from xmodal.tasks.task import Task
from xmodal.train.frozen import join, split
from xmodal.train.state import TrainState


def make_train_step(model, tasks: Mapping[str, Task], task_weights: Mapping[str, float],
                    optimizer: optax.GradientTransformation, *, accumulation: int = 1,
                    ema_decay: float = 0.0, frozen: Set[str] = frozenset()) -> Callable:
  """A pure function (state, batch) -> (state, metrics), to be compiled with jax.jit.

  loss = sum over tasks of task_weight * (sum over its terms of term_weight *
  mean), where a mean is over the examples that count for the term, of the
  whole batch, however many micro-batches and devices it is split into.

  Args:
    model: a models.backbone.MultiTask.
    tasks: the tasks by name.
    task_weights: weight of each task's loss.
    optimizer: the gradient transformation.
    accumulation: micro-batches whose gradients are summed; less memory, same result.
    ema_decay: of the moving average of the parameters; 0 for none.
    frozen: paths of the parameters that stay as they are; the optimizer is of the others.

  Returns:
    The step. Its metrics are float32 scalars: 'loss', 'task/term' of each term,
    'task/progress', 'gradient_norm' (of what is trained), 'skipped' and
    'skipped_in_a_row'. A step whose gradients are not all finite changes nothing but the counters.
  """
  def weights_of(batch):
    """float32 [B] by 'task/term': how much each example counts."""
    return {f'{name}/{term}': weight * batch['valid']
            for name, task in tasks.items()
            for term, weight in task.weights(batch[name]).items()}

  def term_weight(key):
    name, term = key.split('/')
    return task_weights[name] * tasks[name].loss_weights[term]

  def objective(trained, fixed, collections, batch, totals, rng):
    """Loss of a micro-batch as its part of the whole batch's, and what to report."""
    outputs, updated = model.apply(
        {'params': join(trained, fixed), **collections}, batch, deterministic=False,
        rngs={'dropout': rng}, mutable=list(collections))
    weights = weights_of(batch)
    metrics = {}
    for name, task in tasks.items():
      for term, values in task.losses(outputs[name], batch[name]).items():
        key = f'{name}/{term}'
        metrics[key] = (values * weights[key]).sum() / totals[key]
      for key, values in task.progress(outputs[name], batch[name]).items():
        metrics[f'{name}/{key}'] = (values * batch['valid']).sum() / totals['valid']
    loss = sum(term_weight(key) * metrics[key] for key in weights)
    return loss, (updated, {'loss': loss, **metrics})

  def gradients(trained, fixed, collections, batch, rng):
    # Only from data, not from parameters: known before the first micro-batch.
    totals = {key: jnp.maximum(weight.sum(), 1e-6) for key, weight in weights_of(batch).items()}
    totals['valid'] = jnp.maximum(batch['valid'].sum(), 1.0)
    grad = jax.grad(objective, has_aux=True)
    if accumulation == 1:
      grads, (collections, metrics) = grad(trained, fixed, collections, batch, totals, rng)
      return grads, collections, metrics

    # Every device keeps its own examples: micro-batch i takes each i-th of them.
    micro = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

    def add(carry, inputs):
      collections, summed = carry
      part, index = inputs
      grads, (collections, metrics) = grad(
          trained, fixed, collections, part, totals, jax.random.fold_in(rng, index))
      return (collections, jax.tree.map(jnp.add, summed, (grads, metrics))), None

    shapes = jax.eval_shape(grad, trained, fixed, collections,
                            jax.tree.map(lambda x: x[0], micro), totals, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][1]))
    (collections, (grads, metrics)), _ = jax.lax.scan(
        add, (collections, zeros), (micro, jnp.arange(accumulation)))
    return grads, collections, metrics

  def train_step(state: TrainState, batch):
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    trained, fixed = split(state.params, frozen)
    grads, collections, metrics = gradients(trained, fixed, state.collections, batch, rng)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(metrics['loss'])
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    ema = state.ema
    if ema is not None:
      # Young averages follow quickly, so that they do not remember the start.
      decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
      average, fixed_average = split(ema, frozen)
      average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, trained)
      ema = join(average, fixed_average)

    def keep(new, old):
      return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    skipped_in_a_row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    new = state.replace(
        step=state.step + 1, params=keep(join(trained, fixed), state.params),
        collections=keep(collections, state.collections),
        opt_state=keep(opt_state, state.opt_state), ema=keep(ema, state.ema),
        skipped=state.skipped + ~good, skipped_in_a_row=skipped_in_a_row)
    metrics |= {'gradient_norm': norm, 'skipped': new.skipped, 'skipped_in_a_row': skipped_in_a_row}
    return new, metrics

  return train_step
