"""Losses and gradients of one batch, for any tasks, sources and number of micro-batches."""

from collections.abc import Callable, Mapping, Set
import itertools

from flax import traverse_util
import jax
import jax.numpy as jnp

from xmodal.mixer.feed import parts
from xmodal.models.capture import COLLECTION
from xmodal.models.names import read_names
from xmodal.tasks.imitation import last_tokens, likeness_loss
from xmodal.tasks.task import Task
from xmodal.train.steps.frozen import join, split
from xmodal.train.steps.read import as_read

# Folded into the key of a step for random choices of names; micro-batches fold in their numbers.
_NAMES = 0x6e616d65


def make_gradients(model, tasks: Mapping[str, Task], task_weights: Mapping[str, float], *,
                   accumulation: int = 1, separate: bool = False, teacher=None) -> Callable:
  """Makes a pure function that computes a batch's gradients.

  A task's loss = task_weight * (sum over its terms of term_weight * mean). A mean is over the
  examples of the whole batch that count for the term, independent of the number of micro-batches
  and devices.

  Args:
    model: a models.joint.MultiTask.
    tasks: tasks of the batch, by name.
    task_weights: weight of each task's loss.
    accumulation: micro-batches whose gradients are summed; less memory, same result.
    separate: whether to return each task's gradient separately. Tasks of one source share the
      forward pass; each has its own backward pass.
    teacher: a train.start.teacher.Teacher that the model imitates; None: none.

  Returns:
    (trained, fixed, collections, batch, rng, weigh, taught_by) -> (gradients of `trained`,
    collections, losses, metrics). weigh: (losses {task: scalar}) -> their weights in the gradients;
    with several micro-batches the weights must not depend on the losses. With `separate` it is not
    called, and gradients are {task: tree}. taught_by: the teacher's variables.
  """
  def weights_of(part):
    """Per-example weights, float32 [B], by 'task/term'."""
    return {f'{name}/{term}': weight * part['valid']
            for name, task in tasks.items() if name in part
            for term, weight in task.weights(part[name]).items()}

  def counts_of(part):
    """bool [B] by task: whether an example counts for any of its terms."""
    return {name: jnp.any(jnp.stack([*task.weights(part[name]).values()]) > 0, axis=0)
                  & part['valid'] for name, task in tasks.items() if name in part}

  def totals_of(part):
    return {**{key: jnp.maximum(weight.sum(), 1e-6) for key, weight in weights_of(part).items()},
            **{name: jnp.maximum(count.sum(), 1) for name, count in counts_of(part).items()}}

  def vocabularies_of(batch, key):
    """Sampled vocabulary of each task in this step, {task: Names}."""
    return {name: names for part in parts(batch) for name, task in tasks.items()
            if name in part and (names := task.sampled_vocabulary(part[name], key)) is not None}

  def read(trained, fixed, collections, names, rng):
    """Encodes names, see models.names.read_names; once per step for all micro-batches."""
    return read_names(names, lambda trained, tokens: model.apply(
        {'params': as_read(model, join(trained, fixed)), **collections}, tokens, names.end_token,
        deterministic=False, rngs={'dropout': rng}, method='read_names'), trained)

  def forward(learned, fixed, collections, part, vocabularies, totals, rng, taught_by):
    """Losses of a micro-batch part, normalised by totals of the whole batch, and metrics."""
    trained, vectors = learned
    part = part | {name: part[name] | {'vocabulary': names.replace(vectors=vectors[name])}
                   for name, names in vocabularies.items() if name in part}
    seen = [COLLECTION] if teacher and teacher.tokens_weight else []
    outputs, collections = model.apply(
        {'params': as_read(model, join(trained, fixed)), **collections}, part,
        deterministic=False, rngs={'dropout': rng}, mutable=[*collections, *seen])
    collections, own_tokens = dict(collections), {}
    if seen:
      own_tokens = last_tokens(collections)
      collections.pop(COLLECTION, None)
    imitated = {}
    if teacher is not None:
      taught, tokens = teacher.taught(taught_by, _with_names(part, vocabularies), rng)
      imitated = _imitated(teacher, tasks, part, outputs, taught, own_tokens, tokens)
    weights, counts, losses, metrics = weights_of(part), counts_of(part), {}, {}
    for name in outputs:
      task, loss = tasks[name], 0.0
      for term, values in task.losses(outputs[name], part[name]).items():
        key = f'{name}/{term}'
        metrics[key] = (values * weights[key]).sum() / totals[key]
        loss += task.loss_weights[term] * metrics[key]
      for key, (weight, values) in imitated.get(name, {}).items():
        metrics[f'{name}/{key}'] = (values * counts[name]).sum() / totals[name]
        loss += weight * metrics[f'{name}/{key}']
      for key, values in task.progress(outputs[name], part[name]).items():
        metrics[f'{name}/{key}'] = (values * counts[name]).sum() / totals[name]
      losses[name] = task_weights[name] * loss
    return losses, (collections, metrics)

  def of_micro_batch(learned, fixed, collections, batch, vocabularies, totals, rng, weigh,
                     taught_by):
    losses, metrics, pullbacks = {}, {}, []
    for number, part in enumerate(parts(batch)):
      key = rng if number == 0 else jax.random.fold_in(rng, number)
      of_part, pullback, (collections, logged) = jax.vjp(
          lambda x: forward(x, fixed, collections, part, vocabularies, totals[number], key,
                            taught_by),
          learned, has_aux=True)
      pullbacks.append((tuple(of_part), pullback))
      losses |= of_part
      metrics |= logged
    if separate:
      grads = {name: grad for names, pullback in pullbacks
               for name, grad in _one_by_one(names, pullback).items()}
    else:
      weights = weigh(losses)
      grads = _sum([pullback({name: weights[name] for name in names})[0]
                    for names, pullback in pullbacks])
    return (grads, losses, metrics), collections

  def gradients(trained, fixed, collections, batch, rng, weigh=None, taught_by=None):
    # These depend on data only, so they are known before the first micro-batch.
    totals = [totals_of(part) for part in parts(batch)]
    choice, dropout = jax.random.split(jax.random.fold_in(rng, _NAMES))
    vocabularies = vocabularies_of(batch, choice)
    vectors, read_backward = {}, {}
    for name, names in vocabularies.items():
      vectors[name], read_backward[name] = read(trained, fixed, collections, names, dropout)
    grads, collections, losses, metrics = of_batch(
        (trained, vectors), fixed, collections, batch, vocabularies, totals, rng, weigh,
        taught_by)

    def through_names(grads, tasks):
      of_params, of_vectors = grads
      return _sum([of_params, *(read_backward[name](of_vectors[name])[0] for name in tasks)])

    if separate:  # a task's loss depends on its own names only
      grads = {name: through_names(grad, vocabularies.keys() & {name})
               for name, grad in grads.items()}
    else:
      grads = through_names(grads, vocabularies)
    return grads, collections, losses, metrics

  def of_batch(learned, fixed, collections, batch, vocabularies, totals, rng, weigh, taught_by):
    if accumulation == 1:
      found, collections = of_micro_batch(learned, fixed, collections, batch, vocabularies, totals,
                                          rng, weigh, taught_by)
      return found[0], collections, *found[1:]

    # Examples stay on their devices: micro-batch i takes examples i, i + accumulation, ...
    micro = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

    def add(carry, inputs):
      collections, summed = carry
      batch, index = inputs
      found, collections = of_micro_batch(learned, fixed, collections, batch, vocabularies, totals,
                                          jax.random.fold_in(rng, index), weigh, taught_by)
      return (collections, jax.tree.map(jnp.add, summed, found)), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes, _ = jax.eval_shape(lambda: of_micro_batch(
        learned, fixed, collections, first, vocabularies, totals, rng, weigh, taught_by))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (collections, (grads, losses, metrics)), _ = jax.lax.scan(
        add, (collections, zeros), (micro, jnp.arange(accumulation)))
    return grads, collections, losses, metrics

  return gradients


def _with_names(part, vocabularies):
  """The batch as another model reads it, which encodes the step's names itself."""
  return part | {name: part[name] | {'vocabulary': names}
                 for name, names in vocabularies.items() if name in part}


def _imitated(teacher, tasks, part, outputs, taught, own_tokens, tokens):
  """Losses of imitation by task: {term: (its weight, float32 [B])}."""
  found = {name: {f'imitation_{term}': (teacher.weight, values) for term, values in
                  tasks[name].imitation(outputs[name], taught[name], part[name]).items()}
           for name in outputs if name in taught}
  alike = likeness_loss(own_tokens, tokens, len(part['valid']))
  if alike is not None:
    for terms in found.values():
      terms['imitation_tokens'] = teacher.tokens_weight, alike
  return found


def at_step(batch: Mapping, step: jax.Array) -> dict:
  """Adds the training step to a batch: 'step', int32 [B]."""
  if 'valid' not in batch:
    return {feed: at_step(part, step) for feed, part in batch.items()}
  return {**batch, 'step': jnp.full_like(batch['valid'], step, jnp.int32)}


def _one_by_one(names, pullback):
  """{task: gradient of this task's loss only}."""
  # Separate passes, although a loop would compile faster: XLA removes parts with zero gradients.
  # On a CPU, a step of five tasks took a fifth of the time.
  return {name: pullback({other: jnp.float32(other == name) for other in names})[0]
          for name in names}


def _sum(trees):
  total, *others = trees
  for tree in others:
    total = jax.tree.map(jnp.add, total, tree)
  return total


def weighted_sum(grads: Mapping[str, dict], weights: Mapping[str, jax.Array]):
  """Weighted sum of {task: gradients}, one tree."""
  return _sum([jax.tree.map(lambda x: weights[name] * x, grad) for name, grad in grads.items()])


def products(grads: Mapping[str, dict], names: Set[str]) -> jax.Array:
  """float32 [K, K]: inner products of the tasks' gradients at the parameters with these paths."""
  flat = [traverse_util.flatten_dict(split(grad, names)[1]) for grad in grads.values()]
  gram = [[jnp.zeros(())] * len(flat) for _ in flat]
  for i, j in itertools.combinations_with_replacement(range(len(flat)), 2):
    gram[i][j] = gram[j][i] = sum(
        (jnp.vdot(flat[i][path], flat[j][path]) for path in flat[i]), jnp.zeros(()))
  return jnp.array(gram)
