"""Weight of each task's loss in a step: rules that learn it from losses or gradients.

A balance is a few pure functions. Its state is a dict of arrays [K], one entry per
task, stored in the train state and its checkpoints. A step that trains only some
tasks leaves the entries of the others unchanged.

config.mixer.weights, c, mean the same under each rule: at a given state of the rule,
doubling the c of a task doubles its gradient in the sum. The rules converge to:

- fixed: the minimum of sum c_i L_i.
- uncertainty: the minimum of sum c_i (exp(-s_i) L_i + s_i), so a task's c does not change its
  noise s_i.
- dwa: c_i times the paper's weight, a function of loss ratios.
- gradnorm: gradient norms at the shared parameters proportional to
  c_i (loss / first loss)^alpha.
- pcgrad: sum of c_i times the projected gradient of task i; the projection does not depend on the
  c of the others.
- famo: log losses that fall at rates proportional to c_i.

Losses and gradient products passed to a rule already include c_i.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.registry import Registry

# A balance is a class with the interface of Balance; its options are keyword arguments.
BALANCES = Registry('balance', 'config.mixer.balance', 'xmodal.mixer.balance')

OPTIONS = {'balance': Option('fixed', 'Rule for the weights of tasks during training.')}


@BALANCES.register('fixed')
class Balance:
  """Constant config.mixer.weights; the base class of all balances.

  Attributes:
    tasks: names of the tasks, in the order of the state's entries.
    needs: inputs of `weights` besides the state: '', 'losses', or 'gradients' (the inner
      products of all tasks' gradients).
    shared_only: if true, weights apply to the gradients of shared parameters only; task-specific
      parameters receive the unweighted gradient, and the objective is the plain sum of the losses.
  """

  needs = ''
  shared_only = False

  def __init__(self, tasks: Sequence[str], task_weights: Sequence[float] | None = None):
    """task_weights: each task's c, already applied to the losses passed in; None: 1."""
    self.tasks = tuple(tasks)
    self._task_weights = np.array(task_weights or [1.0] * len(self.tasks), np.float32)

  def init(self) -> dict[str, jax.Array]:
    """The initial state; {} if the rule has none."""
    return {}

  def weights(self, state: Mapping, losses: Mapping[str, jax.Array],
              gram: jax.Array | None = None, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """Weight of each task's gradient in this step, in addition to its c.

    Args:
      state: the state before the step.
      losses: float32 scalars c_i L_i of the tasks in the step.
      gram: float32 [K, K], inner products of their gradients at the shared parameters.
      rng: the step's key.

    Returns:
      float32 scalars of the tasks in the step.
    """
    weights = self._weights(state, *self._arrays(losses), gram, rng)
    return {task: weights[i] for i, task in enumerate(self.tasks) if task in losses}

  def update(self, state: Mapping, losses: Mapping[str, jax.Array],
             gram: jax.Array | None = None) -> dict[str, jax.Array]:
    """The state after the step."""
    values, active = self._arrays(losses)
    new = self._update(state, values, active, gram)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, dict(state))

  def _arrays(self, losses):
    """Losses [K], 0 for tasks not in the step, and bool [K], True for tasks in the step."""
    return (jnp.stack([jnp.asarray(losses.get(task, 0.0), jnp.float32) for task in self.tasks]),
            np.array([task in losses for task in self.tasks]))

  def _weights(self, state, losses, active, gram, rng):
    return jnp.ones(len(self.tasks))

  def _update(self, state, losses, active, gram):
    return dict(state)

  def _zeros(self, *names):
    return {name: jnp.zeros(len(self.tasks)) for name in names}


def make_balance(config, every_step: bool) -> Balance:
  """Makes the balance that config.mixer names.

  Args:
    config: the whole config.
    every_step: whether each step trains all tasks.

  Raises:
    UserError: the balance is unknown, or it compares gradients of all tasks and a step trains
      only some.
  """
  mixer = config.mixer
  part = BALANCES[mixer.balance]
  balance = part.make(mixer.tasks, mixer.weights, **{key: mixer[key] for key in part.options})
  if balance.needs == 'gradients' and not every_step:
    raise UserError(f'config.mixer.balance={mixer.balance!r} compares the gradients of all tasks '
                    f'in each step, but config.mixer.sampling={mixer.sampling!r} trains them '
                    "separately; set that to 'joint', or use uncertainty, dwa or famo")
  return balance
