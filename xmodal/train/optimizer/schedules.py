"""Learning rate by step."""

from collections.abc import Iterator

import jax.numpy as jnp
import optax

from xmodal.errors import UserError
from xmodal.options import ABOVE_ZERO, Option
from xmodal.registry import Registry

# A schedule is a function (peak, end, steps, total, **options) -> optax.Schedule of steps after the
# warm-up. peak, end: learning rates; steps, total: number of steps without and with warm-up.
SCHEDULES = Registry('schedule', 'config.optimizer.schedule', 'xmodal.train.optimizer.schedules')


def make_schedule(config, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0, then config.optimizer.schedule.

  Args:
    config: config.optimizer.
    steps: number of steps of the run.

  Raises:
    UserError: the schedule is unknown, or no step is left after the warm-up.
  """
  peak, warmup, schedule = config.learning_rate, config.warmup_steps, SCHEDULES[config.schedule]
  if warmup >= steps:
    raise UserError(f'config.optimizer.warmup_steps={warmup} leaves nothing of '
                    f'config.train.steps={steps}; lower one or raise the other')
  after = schedule.make(peak, peak * config.end_share, steps - warmup, steps,
                        **{key: config[key] for key in schedule.options})
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


@SCHEDULES.register('cosine')
def cosine(peak: float, end: float, steps: int, total: int) -> optax.Schedule:
  """Half a cosine, down to `end` at the last step."""
  del total
  return optax.cosine_decay_schedule(peak, steps, alpha=end / peak)


@SCHEDULES.register('linear')
def linear(peak: float, end: float, steps: int, total: int) -> optax.Schedule:
  """A straight line, down to `end` at the last step."""
  del total
  return optax.linear_schedule(peak, end, steps)


@SCHEDULES.register('constant')
def constant(peak: float, end: float, steps: int, total: int) -> optax.Schedule:
  """The peak, constant; ignores `end`."""
  del end, steps, total
  return optax.constant_schedule(peak)


@SCHEDULES.register('wsd', options={
    'decay_share': Option(0.2, 'Share of all steps, at the end, over which the rate decays.',
                          low=ABOVE_ZERO, high=1, may_change=True)})
def warmup_stable_decay(peak: float, end: float, steps: int, total: int,
                        decay_share: float) -> optax.Schedule:
  """Constant (WSD, arXiv:2404.06395), then down by 1 - sqrt, which arXiv:2405.18392 found best."""
  falling = min(max(1, round(decay_share * total)), steps)

  def rate(step):
    share = (step - (steps - falling)) / falling
    return peak - (peak - end) * jnp.sqrt(jnp.clip(share, 0, 1))

  return rate


def changed_rate(config, begun, step: int) -> Iterator[str]:
  """Yields a line if a run resumed after `step` changes its learning rate.

  Args:
    config, begun: whole configs, of now and of the run so far.
    step: number of steps taken.
  """
  before, after = (float(make_schedule(c.optimizer, c.train.steps)(step)) for c in (begun, config))
  if step < config.train.steps and abs(after - before) > 0.01 * max(after, before):
    yield (f'the learning rate jumps to {after:.3g}, where it was {before:.3g} at step {step}: '
           f'config.train.steps was {begun.train.steps} and is {config.train.steps}, '
           f'config.optimizer.schedule was {begun.optimizer.schedule!r} and is '
           f"{config.optimizer.schedule!r}; 'constant' keeps a rate, 'wsd' does until its decay")
