"""Logged metrics of steps."""

import collections

import jax

from xmodal.errors import UserError
from xmodal.train.logs.report import Report
from xmodal.train.plan import Plan
from xmodal.train.steps import resting

_MOST_SKIPPED = 10


class Logging:
  """Reports the metrics of steps with a delay of two steps, so that the device never waits for a
  read."""

  def __init__(self, plan: Plan, report: Report, skipped: int):
    """skipped: number of steps skipped before."""
    self._config, self._report = plan.config, report
    self._sampling, self._tasks = plan.sampling, tuple(plan.tasks)
    self._running = collections.deque()
    self._recent = {}  # latest value of each metric since the last logged step
    self._skipped = skipped

  def add(self, step: int, metrics) -> None:
    """Adds the metrics of one step, float32 scalars on the devices."""
    self._running.append((step, metrics))
    while len(self._running) > 2:
      self._log(*self._running.popleft())

  def finish(self) -> None:
    """Reports all added steps; a run resumed from here does not repeat them."""
    while self._running:
      self._log(*self._running.popleft())

  def _log(self, step, metrics):
    numbers = {key: float(value) for key, value in jax.device_get(metrics).items()}
    if numbers['skipped'] > self._skipped:
      self._skipped = int(numbers['skipped'])
      self._report.say(f'step {step}: gradients are not finite, step skipped ({self._skipped} so '
                       'far)')
    if numbers['skipped_in_a_row'] >= _MOST_SKIPPED:
      optimizer = self._config.optimizer
      raise UserError(
          f'gradients were not finite for {_MOST_SKIPPED} steps in a row, the last at step {step}: '
          f'lower config.optimizer.learning_rate={optimizer.learning_rate} or '
          f'config.optimizer.clip_norm, and start in a new --workdir')
    self._recent |= numbers
    share = resting.of_steps(self._sampling, self._tasks, step)
    train = self._config.train
    if step % train.log_every == 0 or step == train.steps:
      self._report.train(step, self._recent | share)
      self._recent = {}
    self._report.advance(step, numbers | share)
