"""Everything that a step of training changes, born where it is to live."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from xmodal.sharding import mesh as meshes
from xmodal.sharding import rules


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds.

  Attributes:
    step: int32, steps taken; the batch of the next step depends on it.
    params: float32 parameters.
    collections: other Flax variables (running statistics of batch norm).
    opt_state: of the optimiser.
    ema: moving average of params, or None.
    rng: key of the run; a step folds its number in.
    skipped: int32, steps whose gradients were not finite and changed nothing.
    skipped_in_a_row: int32, of those, the ones since the last good step.
  """

  step: jax.Array
  params: Any
  collections: Any
  opt_state: Any
  ema: Any
  rng: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  @property
  def variables(self):
    """The variables that evaluation applies the model with."""
    return {'params': self.params if self.ema is None else self.ema, **self.collections}


def init_fn(model, optimizer: optax.GradientTransformation, batch, seed: int, ema: bool):
  """A function without arguments that makes a new TrainState; batch gives shapes only."""
  def init():
    key = jax.random.key(seed)
    init_key, train_key = jax.random.split(key)
    # Parameters do not depend on the batch: zeros of one example will do.
    dummy = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    variables = model.init(init_key, dummy, deterministic=True)
    params = variables.pop('params')
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, params=params, collections=variables, opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=jax.random.key_data(train_key), skipped=zero, skipped_in_a_row=zero)
  return init


def state_sharding(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh):
  """A NamedSharding for each array of the state, by the rule table."""
  whole = meshes.replicated(mesh)
  params = rules.shard_tree(abstract.params, mesh)
  return TrainState(
      step=whole, params=params, collections=rules.shard_tree(abstract.collections, mesh),
      opt_state=rules.shard_optimizer(optimizer, abstract.opt_state, params, whole),
      ema=None if abstract.ema is None else params, rng=whole, skipped=whole,
      skipped_in_a_row=whole)


def abstract_state(init, optimizer: optax.GradientTransformation, mesh: Mesh):
  """Shapes, dtypes and shardings of the state that init makes; nothing is computed."""
  abstract = jax.eval_shape(init)
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract, state_sharding(abstract, optimizer, mesh))


def create(init, abstract) -> TrainState:
  """A new state; each device computes its own part of it."""
  return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
