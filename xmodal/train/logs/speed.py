"""How fast training runs: examples, FLOPs and the share of time in which it waits for input."""

from collections.abc import Callable, Iterator
import contextlib
import time

import jax

from xmodal.cost import machines

# Metrics that differ between equal runs.
NAMES = ('examples_per_second', 'input_wait', 'model_flops_per_second', 'mfu')


class Speed:
  """Times steps in laps, which end at logged steps and before pauses.

  Attributes:
    flops: model FLOPs of a step (counted from 1) over all devices, see cost.flops; None: unknown.
    step: the last lap's last step.
    seconds: of all laps, that is the time of steps without pauses.
  """

  def __init__(self, start: int, batch_size: float):
    """
    Args:
      start: number of steps taken before.
      batch_size: examples per step.
    """
    self.flops: Callable[[int], float] | None = None
    self.seconds = 0.0
    self._batch_size = batch_size
    self._clock, self.step = time.perf_counter(), start
    self._waited_of_lap = 0.0
    self._lap = self._total = (0, 0.0, 0.0, 0.0)  # steps, seconds, seconds of waiting, FLOPs

  @contextlib.contextmanager
  def waiting(self, last: jax.Array) -> Iterator[None]:
    """Counts as waiting for input, unless the devices still compute `last`, of an earlier step."""
    began = time.perf_counter()
    yield
    if last.is_ready():
      self._waited_of_lap += time.perf_counter() - began

  def lap(self, step: int) -> None:
    """Ends a lap after a step; a lap without a step leaves the numbers of the last one."""
    now = time.perf_counter()
    if steps := step - self.step:
      seconds = max(now - self._clock, 1e-9)
      flops = sum(map(self.flops, range(self.step + 1, step + 1))) if self.flops else 0.0
      self._lap = (steps, seconds, self._waited_of_lap, flops)
      self._total = tuple(a + b for a, b in zip(self._total, self._lap))
      self.seconds += seconds
    self._clock, self.step, self._waited_of_lap = now, step, 0.0

  def resume(self) -> None:
    """Begins a lap after a pause."""
    self._clock = time.perf_counter()

  def numbers(self) -> dict[str, float]:
    """The metrics NAMES of the last lap; those of FLOPs only where known."""
    return self._numbers(*self._lap)

  def means(self) -> dict[str, float]:
    """The same over all laps."""
    return self._numbers(*self._total)

  def _numbers(self, steps, seconds, waited, flops):
    seconds = max(seconds, 1e-9)
    found = {'examples_per_second': steps * self._batch_size / seconds,
             'input_wait': waited / seconds}
    if self.flops is not None:
      found['model_flops_per_second'] = flops / seconds
      mfu = machines.utilization(flops, seconds, [x.device_kind for x in jax.devices()])
      if mfu is not None:
        found['mfu'] = mfu
    return found
