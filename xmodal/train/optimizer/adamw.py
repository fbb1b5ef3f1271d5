"""AdamW (arXiv:1711.05101)."""

import optax

from xmodal.train.optimizer.optimizer import OPTIMIZERS, decays, with_separate_counts


@OPTIMIZERS.register('adamw')
def adamw(config, schedule, resting) -> optax.GradientTransformation:
  """AdamW; biases, norms and positions do not decay."""
  # The parts of optax.adamw. The schedule counts all steps of the run, also for resting parameters.
  return optax.chain(
      with_separate_counts(optax.scale_by_adam(config.b1, config.b2, config.eps), resting),
      optax.add_decayed_weights(config.weight_decay, decays),
      optax.scale_by_learning_rate(schedule))
