"""AdamW (arXiv:1711.05101)."""

import optax

from xmodal.train.optimizer.optimizer import OPTIMIZERS, counted_apart, decays


@OPTIMIZERS.register('adamw')
def adamw(config, schedule, resting) -> optax.GradientTransformation:
  """AdamW; biases, norms and positions do not decay."""
  # The parts of optax.adamw; the steps of the schedule are those of the run, rest or not.
  return optax.chain(
      counted_apart(optax.scale_by_adam(config.b1, config.b2, config.eps), resting),
      optax.add_decayed_weights(config.weight_decay, decays),
      optax.scale_by_learning_rate(schedule))
