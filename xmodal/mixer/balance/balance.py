"""Weight of each task's loss in a step: rules that learn it from losses or gradients.

A balance is a few pure functions. Its state is a dict of arrays [K], one entry a
task: part of the train state and of its checkpoints. In a step that trains some
of the tasks the entries of the others stay as they are.

config.mixer.weights, c, keep their meaning under each rule. At the same state of
the rule, twice the c of a task is twice its gradient in the sum. What a rule
then settles at:

- fixed: the minimum of sum c_i L_i.
- uncertainty: the minimum of sum c_i (exp(-s_i) L_i + s_i), so the c of a task does not change its
  noise s_i.
- dwa: c_i times the weight of the paper, which looks at ratios of losses.
- gradnorm: the gradient norms of the shared parameters are as c_i (loss / first loss)^alpha.
- pcgrad: sum of c_i times the projected gradient of task i; what is projected out does not depend
  on the c of the others.
- famo: log losses that fall in proportion to c_i.

All losses and products of gradients that a rule is given are those of c_i L_i.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.registry import Registry

# A balance is a class with the interface of Balance; its options are keywords of __init__.
BALANCES = Registry('balance', 'config.mixer.balance', 'xmodal.mixer.balance')

OPTIONS = {'balance': Option('fixed', 'How the weights of tasks change in training.')}


@BALANCES.register('fixed')
class Balance:
  """config.mixer.weights as they are; the base of all others.

  Attributes:
    tasks: their names, in the order of the state's entries.
    needs: what `weights` looks at beside the state: '', 'losses', or 'gradients' (the products
      of the gradients of all tasks).
    of_shared: if true, weights apply to the gradients of shared parameters only, and say what is
      left of each: task-specific parameters receive the unweighted gradient, and the objective is
      the plain sum of the losses.
  """

  needs = ''
  of_shared = False

  def __init__(self, tasks: Sequence[str], task_weights: Sequence[float] | None = None):
    """task_weights: what the losses that it will be given are multiplied by; None: 1."""
    self.tasks = tuple(tasks)
    self._task_weights = np.array(task_weights or [1.0] * len(self.tasks), np.float32)

  def init(self) -> dict[str, jax.Array]:
    """The state before the first step; {} if there is none."""
    return {}

  def weights(self, state: Mapping, losses: Mapping[str, jax.Array],
              gram: jax.Array | None = None, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """Weight of each task's gradient in this step, beside its c.

    Args:
      state: as it is before the step.
      losses: float32 scalars c_i L_i of the tasks in the step.
      gram: float32 [K, K], products of the gradients of those, of shared parameters.
      rng: key of the step.

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
    """Losses [K], 0 for tasks that are not in the step, and which are, bool [K]."""
    return (jnp.stack([jnp.asarray(losses.get(task, 0.0), jnp.float32) for task in self.tasks]),
            np.array([task in losses for task in self.tasks]))

  def _weights(self, state, losses, active, gram, rng):
    return jnp.ones(len(self.tasks))

  def _update(self, state, losses, active, gram):
    return dict(state)

  def _zeros(self, *names):
    return {name: jnp.zeros(len(self.tasks)) for name in names}


def make_balance(config, every_step: bool) -> Balance:
  """The balance of config.mixer.

  Args:
    config: the whole config.
    every_step: whether each step trains all tasks.

  Raises:
    UserError: no such balance, or one that compares gradients where tasks do not meet.
  """
  mixer = config.mixer
  part = BALANCES[mixer.balance]
  balance = part.make(mixer.tasks, mixer.weights, **{key: mixer[key] for key in part.options})
  if balance.needs == 'gradients' and not every_step:
    raise UserError(f'config.mixer.balance={mixer.balance!r} compares the gradients of all tasks '
                    f'in each step, and config.mixer.sampling={mixer.sampling!r} trains them '
                    "apart; set that to 'joint', or take uncertainty, dwa or famo")
  return balance
