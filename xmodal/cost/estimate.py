"""Estimates the time of a step from what it computes and moves, by published figures."""

from collections.abc import Iterable
import dataclasses

from xmodal.cost.hlo import Collective, Cost
from xmodal.cost.machines import Machine

# Products with what results: bytes that each of n devices sends, as a multiple of the result.
_SENT = {'all-reduce': lambda n: 2 * (n - 1) / n, 'all-gather': lambda n: (n - 1) / n,
         'reduce-scatter': lambda n: n - 1, 'all-to-all': lambda n: (n - 1) / n,
         'ragged-all-to-all': lambda n: (n - 1) / n}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step, if nothing but these took time.

  Attributes:
    compute: of matrix products and convolutions at the machine's peak.
    memory: of the traffic of all other kernels at the memory's bandwidth. Products are bound by
      compute, and on a GPU kernels run one after the other.
    links: of collectives over links and network. They overlap with the rest where the compiler
      manages to.
  """

  compute: float
  memory: float
  links: float

  @property
  def step(self) -> float:
    """Seconds of a step whose collectives overlap completely."""
    return max(self.compute + self.memory, self.links)

  @property
  def limit(self) -> str:
    """What takes longest."""
    if self.links > self.compute + self.memory:
      return 'links'
    return 'compute' if self.compute >= self.memory else 'memory'


def step(machine: Machine, flops: float, cost: Cost, per_group: int) -> Estimate:
  """Estimates one step of one device.

  Args:
    machine: its figures.
    flops: hardware FLOPs on this device.
    cost: what its program moves.
    per_group: devices that fast links connect: GPUs of a host, chips of a slice.
  """
  return Estimate(flops / machine.flops, cost.other_bytes / machine.bandwidth,
                  sum(seconds(machine, one, per_group) for one in cost.collectives))


def seconds(machine: Machine, one: Collective, per_group: int) -> float:
  """Seconds of a collective, all its executions together."""
  count = len(one.group)
  if count == 1:
    return 0.0
  sent = _SENT.get(one.kind, lambda n: 1.0)(max(count, 2)) * one.bytes * one.times
  hosts = len({device // per_group for device in one.group})
  if hosts < 2:
    return sent / machine.links
  # Each device of a host carries its part of what leaves the host.
  return max(sent / machine.links, sent / (machine.network * count / hosts))


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, float]]:
  """How often each kind of collective runs, and bytes of its results: {kind: (times, bytes)}."""
  found = {}
  for one in collectives:
    times, size = found.get(one.kind, (0, 0.0))
    found[one.kind] = times + one.times, size + one.times * one.bytes
  return found
