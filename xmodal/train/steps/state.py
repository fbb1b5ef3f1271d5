"""The training state: created with its shardings, updated by every step."""

from collections.abc import Callable, Set
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from xmodal.mixer.balance.balance import Balance
from xmodal.mixer.feed import parts
from xmodal.sharding import mesh as meshes
from xmodal.sharding import rules
from xmodal.train.optimizer.optimizer import by_parameter
from xmodal.train.steps.frozen import join, split


@flax.struct.dataclass
class TrainState:
  """The state that a checkpoint holds.

  Attributes:
    step: int32, number of steps taken; determines the next batch.
    params: float32 parameters.
    collections: other Flax variables (running statistics of batch norm).
    opt_state: state of the optimizer, for the trained parameters only.
    ema: moving average of params, or None.
    mixer: state of the balance, see mixer.balance.
    rng: random key of the run; each step folds in its number.
    skipped: int32, number of steps skipped because gradients were not finite.
    skipped_in_a_row: int32, number of steps skipped since the last finite one.
  """

  step: jax.Array
  params: Any
  collections: Any
  opt_state: Any
  ema: Any
  mixer: Any
  rng: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  @property
  def variables(self):
    """The variables of evaluation: with the moving average if there is one."""
    return {'params': self.params if self.ema is None else self.ema, **self.collections}


def variables_fn(model, batch, seed: int):
  """A function without arguments that initialises the model's variables; `batch` gives shapes."""
  @jax.jit  # traced once, although several callers need the shapes
  def variables():
    init_key, _ = jax.random.split(jax.random.key(seed))
    # Parameters do not depend on the batch: zeros for one example suffice.
    dummy = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
    first, *others = (model.init(init_key, part, deterministic=True) for part in parts(dummy))
    for other in others:  # one per source: each initialises the parts that it uses
      first = join(other, first)
    return first
  return variables


def init_fn(variables, optimizer: optax.GradientTransformation, seed: int, ema: bool,
            frozen: Set[str] = frozenset(), balance: Balance = Balance(())):
  """A function without arguments that makes a new TrainState.

  Args:
    variables: from variables_fn.
    optimizer: optimizer of the trained parameters.
    seed: seed of the run.
    ema: whether to keep a moving average of the parameters.
    frozen: paths of the frozen parameters.
    balance: balance of the tasks.
  """
  def init():
    _, train_key = jax.random.split(jax.random.key(seed))
    collections = variables()
    params = collections.pop('params')
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero, params=params, collections=collections,
        opt_state=optimizer.init(split(params, frozen)[0]),
        ema=jax.tree.map(jnp.copy, params) if ema else None, mixer=balance.init(),
        rng=jax.random.key_data(train_key), skipped=zero, skipped_in_a_row=zero)
  return init


def state_sharding(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh,
                   frozen: Set[str] = frozenset()):
  """A NamedSharding for each array of the state, from the sharding rules."""
  whole = meshes.replicated(mesh)
  params = rules.shard_tree(abstract.params, mesh)
  return TrainState(
      step=whole, params=params, collections=rules.shard_tree(abstract.collections, mesh),
      opt_state=by_parameter(optimizer, abstract.opt_state, split(params, frozen)[0], whole),
      ema=None if abstract.ema is None else params,
      mixer=jax.tree.map(lambda _: whole, abstract.mixer), rng=whole, skipped=whole,
      skipped_in_a_row=whole)


def abstract_state(init, optimizer: optax.GradientTransformation, mesh: Mesh,
                   frozen: Set[str] = frozenset()):
  """Shapes, dtypes and shardings of the state that init makes; computes nothing."""
  abstract = jax.eval_shape(init)
  return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract, state_sharding(abstract, optimizer, mesh, frozen))


def create(init, abstract) -> TrainState:
  """Creates a state; each device computes its own shards."""
  return compile_create(init, abstract)()


def compile_create(init, abstract) -> Callable[[], TrainState]:
  """Compiles the creation of a state."""
  return jax.jit(init, out_shardings=jax.tree.map(
      lambda x: x.sharding, abstract)).lower().compile()
