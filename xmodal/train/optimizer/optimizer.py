"""The optimizer: clipping by global norm, then one of OPTIMIZERS."""

from collections.abc import Collection, Set

import jax
import optax

from xmodal.models.lora import is_adapter
from xmodal.options import ABOVE_ZERO, BELOW_ONE, Option
from xmodal.registry import Registry
from xmodal.sharding.rules import path_name
from xmodal.train.optimizer.rates import rates

OPTIONS = {
    'name': Option('adamw', 'adamw; or muon: orthogonalised updates for the matrices of layers.'),
    'learning_rate': Option(1e-3, 'Peak learning rate.', low=ABOVE_ZERO),
    'warmup_steps': Option(100, 'Steps of linear warm-up from 0.', low=0),
    'schedule': Option('cosine', 'Shape after the warm-up; constant and wsd keep the rate when '
                       'train.steps is raised.', may_change=True),
    'end_share': Option(0.01, 'Final learning rate, as a share of the peak.', low=0, high=1),
    'weight_decay': Option(0.05, 'Decoupled weight decay.', low=0),
    'clip_norm': Option(1.0, 'Global norm to which gradients are clipped.', low=ABOVE_ZERO),
    'b1': Option(0.9, 'Decay of the first moment.', low=0, high=BELOW_ONE),
    'b2': Option(0.98, 'Decay of the second moment.', low=0, high=BELOW_ONE),
    'eps': Option(1e-8, 'Added to the root of the second moment.', low=ABOVE_ZERO),
    'frozen': Option('', "Regular expression of the paths of parameters that never change, such as "
                     "'vision_tower'.", is_pattern=True),
    'vision_rate': Option(1.0, 'Factor of the learning rate in the vision tower.', low=ABOVE_ZERO),
    'text_rate': Option(1.0, 'Factor of the learning rate in the text tower.', low=ABOVE_ZERO),
    'layer_decay': Option(1.0, 'Factor of the learning rate from each layer to the one before.',
                          low=ABOVE_ZERO, high=1)}
# An optimizer is a function (config.optimizer, schedule, resting) -> optax.GradientTransformation
# whose updates are added to the parameters; see make_optimizer for the arguments.
OPTIMIZERS = Registry('optimizer', 'config.optimizer.name', 'xmodal.train.optimizer')


def decays(params):
  """A tree of booleans, True for parameters with weight decay: kernels, adapters, token embeddings.

  T5's relative position table is an attention bias, so it has no decay, as other biases.
  """
  def decays_one(path, _):
    name = path_name(path)
    return name.endswith(('/kernel', '/token_embedding/embedding')) or is_adapter(name)

  return jax.tree_util.tree_map_with_path(decays_one, params)


def make_optimizer(config, schedule: optax.Schedule, params, resting: Collection[Set[str]] = ()
                   ) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW or Muon; biases, norms and positions do not decay.

  With Muon, parameters other than the matrices of layers use AdamW with Nesterov momentum.

  Args:
    config: config.optimizer.
    schedule: see make_schedule.
    params: all parameters, or their shapes; they determine the rates of towers and layers. The
      optimizer's own init takes the trained parameters only.
    resting: for each kind of step, the paths of the parameters that it does not update.
      Parameters that rest in the same kinds share one step counter, used for the bias correction
      of moments; see train.steps.step.

  Raises:
    UserError: the optimizer is unknown.
  """
  optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm),
                          OPTIMIZERS[config.name].make(config, schedule, resting))
  if config.vision_rate == config.text_rate == config.layer_decay == 1:
    return optimizer
  # Last, so that weight decay is scaled too, as it is by a learning rate.
  return optax.chain(optimizer, _scale(rates(config, params)))


def by_parameter(optimizer: optax.GradientTransformation, opt_state, values, otherwise):
  """A tree like opt_state, with each parameter's value in place of its moments.

  Args:
    optimizer: the optimizer of opt_state.
    opt_state: optimizer state, or its shapes.
    values: a tree like the trained parameters.
    otherwise: value for counters.
  """
  def masked(x):  # place of a parameter that another part of the optimizer updates
    return isinstance(x, optax.MaskedNode)

  return optax.tree_map_params(
      optimizer, lambda x, value: x if masked(x) else value, opt_state, values,
      transform_non_params=lambda _: otherwise, is_leaf=masked)


def with_separate_counts(directions, resting):
  """`directions` with a separate state per group of parameters that rest in the same kinds."""
  def group(name):
    return ''.join('r' if name in rests else 'm' for rests in resting)

  if len(groups := {'m' * len(resting), *map(group, frozenset().union(*resting))}) == 1:
    return directions
  return optax.partition(
      {name: directions for name in sorted(groups)},
      lambda params: jax.tree_util.tree_map_with_path(lambda path, _: group(path_name(path)),
                                                      params))


def _scale(factors):
  """Multiplies each update by the factor of its path."""
  def scaled(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factors[path_name(path)], updates)

  return optax.stateless(scaled)
