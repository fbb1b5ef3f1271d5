"""AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982), and learning rates by step."""

from collections.abc import Collection, Iterator, Set
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from xmodal.errors import UserError
from xmodal.models.lora import is_adapter
from xmodal.sharding.rules import path_name
from xmodal.train.rates import rates

NAMES = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'constant', 'wsd')
# Of the kernels of stacked layers, [L, in, out].
_LAYERS = re.compile(r'(^|.*[/_])layers/.*/kernel')
# Root mean square of Muon's updates: about AdamW's (arXiv:2502.16982, section 2.2).
_MUON_SIZE = 0.2


def make_schedule(config, steps: int) -> optax.Schedule:
  """Learning rate by step, of config.optimizer: linear from 0 over the warm-up, then as it says.

  'cosine' and 'linear' fall to end_share of the peak at the last step; 'constant' stays; 'wsd'
  (warm-up, stable, decay: arXiv:2404.06395) stays, and in the last decay_share of the steps falls
  by 1 - sqrt, which arXiv:2405.18392 found best.

  Raises:
    UserError: there is no such schedule, or no step is left after the warm-up.
  """
  peak, warmup, end = config.learning_rate, config.warmup_steps, (
      config.learning_rate * config.end_share)
  if config.schedule not in SCHEDULES:
    raise UserError(f'config.optimizer.schedule={config.schedule!r}: wanted one of '
                    f'{", ".join(SCHEDULES)}')
  if warmup >= steps:
    raise UserError(f'config.optimizer.warmup_steps={warmup} leaves nothing of '
                    f'config.train.steps={steps}; lower one or raise the other')
  if config.schedule == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end_value=end)
  if config.schedule == 'constant':
    return optax.warmup_constant_schedule(0.0, peak, warmup)
  # Of the steps after the warm-up:
  falling = steps - warmup
  if config.schedule == 'linear':
    after = optax.linear_schedule(peak, end, falling)
  else:
    falling = min(max(1, round(config.decay_share * steps)), falling)

    def after(step):
      share = (step - (steps - warmup - falling)) / falling
      return peak - (peak - end) * jnp.sqrt(jnp.clip(share, 0, 1))

  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def changed_rate(config, begun, step: int) -> Iterator[str]:
  """A line if a run that goes on after `step` does not go on at the learning rate it had.

  Args:
    config, begun: the whole config, as it is and as it was.
    step: steps taken.
  """
  before, after = (float(make_schedule(c.optimizer, c.train.steps)(step)) for c in (begun, config))
  if step < config.train.steps and abs(after - before) > 0.01 * max(after, before):
    yield (f'the learning rate goes on at {after:.3g}, where it was {before:.3g} at step {step}: '
           f'config.train.steps was {begun.train.steps} and is {config.train.steps}, '
           f'config.optimizer.schedule was {begun.optimizer.schedule!r} and is '
           f"{config.optimizer.schedule!r}; 'constant' holds a rate, 'wsd' does up to its decay")


def decays(params):
  """True for parameters that weight decay pulls to zero: kernels, adapters and token embeddings.

  T5's table of relative positions is a bias of the attention, and is left alone as biases are.
  """
  def decays_one(path, _):
    name = path_name(path)
    return name.endswith(('/kernel', '/token_embedding/embedding')) or is_adapter(name)

  return jax.tree_util.tree_map_with_path(decays_one, params)


def make_optimizer(config, schedule: optax.Schedule, params, resting: Collection[Set[str]] = ()
                   ) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW or Muon; biases, norms and positions do not decay.

  Muon moves the matrices of layers, AdamW with Nesterov's momentum all else.

  Args:
    config: config.optimizer.
    schedule: see make_schedule.
    params: all parameters, or their shapes: what the rates of towers and layers go by. The
      optimiser itself is given those that are trained.
    resting: of each kind of step, the paths of the parameters that it leaves alone. Parameters
      that rest in the same kinds share one counter of their steps, by which the bias of young
      moments is corrected; see train.step for what rests.

  Raises:
    UserError: there is no such optimiser.
  """
  if config.name not in NAMES:
    raise UserError(f'config.optimizer.name={config.name!r}: wanted {" or ".join(NAMES)}')
  make = _muon if config.name == 'muon' else _adamw
  optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm),
                          make(config, schedule, resting))
  if config.vision_rate == config.text_rate == config.layer_decay == 1:
    return optimizer
  # Last, so that weight decay is scaled too, as it is by a learning rate.
  return optax.chain(optimizer, _scale(rates(config, params)))


def by_parameter(optimizer: optax.GradientTransformation, opt_state, values, otherwise):
  """A tree like opt_state: for what belongs to a parameter its value, else `otherwise`.

  Args:
    optimizer: that the state is of.
    opt_state: its state, or the shapes.
    values: a tree like the parameters that are trained.
    otherwise: for counters.
  """
  def masked(x):  # where a parameter would be that another part of the optimiser moves
    return isinstance(x, optax.MaskedNode)

  return optax.tree_map_params(
      optimizer, lambda x, value: x if masked(x) else value, opt_state, values,
      transform_non_params=lambda _: otherwise, is_leaf=masked)


def _adamw(config, schedule, resting):
  # The parts of optax.adamw; the steps of the schedule are those of the run, rest or not.
  return optax.chain(
      _counted_apart(optax.scale_by_adam(config.b1, config.b2, config.eps), resting),
      optax.add_decayed_weights(config.weight_decay, decays),
      optax.scale_by_learning_rate(schedule))


def _muon(config, schedule, resting):
  # Directions alone, hence the minus: sign, rate and decay are the same for all parameters.
  directions = muon(
      -config.muon_rate, consistent_rms=_MUON_SIZE,
      muon_weight_dimension_numbers=_matrices, adam_learning_rate=-1.0, adam_b1=config.b1,
      adam_b2=config.b2, eps=config.eps)
  return optax.chain(_counted_apart(directions, resting),
                     optax.add_decayed_weights(config.weight_decay, decays),
                     optax.scale_by_learning_rate(schedule))


def _counted_apart(directions, resting):
  """`directions` with a state for each group of parameters that rest in the same kinds of steps."""
  def group(name):
    return ''.join('r' if name in rests else 'm' for rests in resting)

  if len(groups := {'m' * len(resting), *map(group, frozenset().union(*resting))}) == 1:
    return directions
  return optax.partition(
      {name: directions for name in sorted(groups)},
      lambda params: jax.tree_util.tree_map_with_path(lambda path, _: group(path_name(path)),
                                                      params))


def _matrices(params):
  """How Muon sees the kernels of layers, each layer for itself; None for all else."""
  def matrix(path, x):
    if x.ndim == 3 and _LAYERS.fullmatch(path_name(path)):
      return MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return None

  return jax.tree_util.tree_map_with_path(matrix, params)


def _scale(factors):
  """Multiplies each update by the factor of its path."""
  def scaled(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factors[path_name(path)], updates)

  return optax.stateless(scaled)
