"""AdamW (arXiv:1711.05101) with warm-up and cosine decay, from a config."""

import jax
import optax

from xmodal.errors import UserError
from xmodal.models.lora import is_adapter
from xmodal.sharding.rules import path_name
from xmodal.train.rates import rates


def make_schedule(config, steps: int) -> optax.Schedule:
  """Learning rate by step: linear from 0 over the warm-up, then a cosine to a share of its peak."""
  if config.warmup_steps >= steps:
    raise UserError(f'config.optimizer.warmup_steps={config.warmup_steps} leaves nothing of '
                    f'config.train.steps={steps}; lower one or raise the other')
  return optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup_steps, steps,
      end_value=config.learning_rate * config.end_share)


def decays(params):
  """True for parameters that weight decay pulls to zero: kernels, adapters and token embeddings.

  T5's table of relative positions is a bias of the attention, and is left alone as biases are.
  """
  def decays_one(path, _):
    name = path_name(path)
    return name.endswith(('/kernel', '/token_embedding/embedding')) or is_adapter(name)

  return jax.tree_util.tree_map_with_path(decays_one, params)


def make_optimizer(config, schedule: optax.Schedule, params) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW; biases, norms and positions do not decay.

  Args:
    config: config.optimizer.
    schedule: see make_schedule.
    params: all parameters, or their shapes: what the rates of towers and layers go by. The
      optimiser itself is given those that are trained.

  Raises:
    UserError: a number is outside what it may be.
  """
  for key in ('learning_rate', 'clip_norm', 'eps', 'vision_rate', 'text_rate', 'layer_decay'):
    if not config[key] > 0:
      raise UserError(f'config.optimizer.{key}={config[key]} must be above 0')
  if config.weight_decay < 0 or not (0 <= config.b1 < 1 and 0 <= config.b2 < 1):
    raise UserError(f'config.optimizer: weight_decay={config.weight_decay} must be 0 or more, and '
                    f'b1={config.b1} and b2={config.b2} in [0, 1)')
  if config.layer_decay > 1:
    raise UserError(f'config.optimizer.layer_decay={config.layer_decay} must be 1 or less')
  optimizer = optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=decays))
  if config.vision_rate == config.text_rate == config.layer_decay == 1:
    return optimizer
  # Last, so that weight decay is scaled too, as it is by a learning rate.
  return optax.chain(optimizer, _scale(rates(config, params)))


def _scale(factors):
  """Multiplies each update by the factor of its path."""
  def scaled(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factors[path_name(path)], updates)

  return optax.stateless(scaled)
