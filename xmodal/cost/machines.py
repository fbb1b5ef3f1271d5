"""Published figures of accelerators."""

from collections.abc import Iterable
import dataclasses
import os

from xmodal.errors import UserError

# JAX's variable for the share of a GPU's memory that it takes at its start.
FRACTION = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
# For messages about a step that needs more memory.
SMALLER = ('raise config.mesh.fsdp or config.train.accumulation, set config.model.remat=full, or '
           'take more devices')


@dataclasses.dataclass(frozen=True)
class Machine:
  """What one device can do by its datasheet.

  Attributes:
    flops: dense 16-bit matrix products, FLOP/s.
    memory: bytes.
    bandwidth: of the memory, bytes/s.
    links: to devices of the same host (GPU) or slice (TPU), all together, bytes/s in one direction.
    network: share of the network between hosts (GPU) or slices (TPU), bytes/s in one direction.
    per_host: devices of one host that `links` connect (GPU); None: a torus of a whole slice (TPU).
    wires: dimensions of that torus (TPU).
  """

  flops: float
  memory: float
  bandwidth: float
  links: float
  network: float
  per_host: int | None = None
  wires: int = 0

  @property
  def pool(self) -> float:
    """Bytes that JAX takes for arrays: on a GPU three quarters unless the environment says other.

    Raises:
      UserError: XLA_PYTHON_CLIENT_MEM_FRACTION is no share.
    """
    if self.per_host is None:
      return self.memory
    text = os.environ.get(FRACTION) or '0.75'
    try:
      share = float(text)
    except ValueError:
      share = 0
    if not 0 < share <= 1:
      raise UserError(f'{FRACTION}={text}: wanted a number above 0, up to 1')
    return share * self.memory


# GPUs: NVIDIA's datasheets without sparsity, one 400 Gbit/s (A100: 200) adapter each, as in DGX and
# HGX systems. TPUs: cloud.google.com/tpu/docs/system-architecture; the networks between slices
# are those of jax-ml.github.io/scaling-book.
MACHINES = {
    'a100': Machine(312e12, 80e9, 2.04e12, 300e9, 25e9, per_host=8),
    'h100': Machine(989e12, 80e9, 3.35e12, 450e9, 50e9, per_host=8),
    'h200': Machine(989e12, 141e9, 4.8e12, 450e9, 50e9, per_host=8),
    'b200': Machine(2250e12, 180e9, 7.7e12, 900e9, 50e9, per_host=8),
    'v4': Machine(275e12, 32e9, 1.23e12, 270e9, 6.25e9, wires=3),
    'v5e': Machine(197e12, 16e9, 0.82e12, 180e9, 3.1e9, wires=2),
    'v5p': Machine(459e12, 95e9, 2.77e12, 540e9, 6.25e9, wires=3),
    'v6e': Machine(918e12, 32e9, 1.64e12, 360e9, 12.5e9, wires=2)}

# Parts of the name that JAX gives a device; the first that occurs counts.
_KINDS = (('h200', 'h200'), ('h100', 'h100'), ('a100', 'a100'), ('b200', 'b200'),
          ('v5 lite', 'v5e'), ('v5e', 'v5e'), ('v5p', 'v5p'), ('v5', 'v5p'), ('v6 lite', 'v6e'),
          ('v6e', 'v6e'), ('v4', 'v4'))


def find(device_kind: str) -> Machine | None:
  """The figures of a device by JAX's name for it, such as 'NVIDIA H100 80GB HBM3'; None if unknown.
  """
  return next((MACHINES[name] for part, name in _KINDS if part in device_kind.lower()), None)


def utilization(flops: float, seconds: float, kinds: Iterable[str]) -> float | None:
  """MFU: the share (0..1) of the devices' peak FLOP/s that a step reaches (arXiv:2204.02311).

  Args:
    flops: model FLOPs of a step, over all devices.
    seconds: of a step.
    kinds: `device_kind` of each device.

  Returns:
    None if a device is unknown, as CPUs are.
  """
  machines = [find(kind) for kind in kinds]
  if None in machines or seconds <= 0:
    return None
  return flops / seconds / sum(machine.flops for machine in machines)
