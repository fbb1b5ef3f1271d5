"""Which mesh a number of devices should form, by what a step must compute, hold and send."""

from collections.abc import Iterator
import dataclasses
import math

from jax.extend.core import jaxprs_in_params

from xmodal.cost import flops
from xmodal.cost.estimate import Estimate, seconds
from xmodal.cost.hlo import Collective
from xmodal.cost.machines import Machine

# Traffic of kernels that do not multiply matrices, as a multiple of the activations that the
# backward pass keeps, rounded down: 16 in vqa large compiled for one H200, 26 to 28 in vqa base for
# eight H100. Predictions are lower bounds.
_TRAFFIC = 15
# Gradients and AdamW: bytes that a step reads and writes for each parameter.
_UPDATE = 40
# Share of the memory that a plan may fill: workspaces and fragments take the rest.
_USABLE = 0.85


@dataclasses.dataclass(frozen=True)
class Load:
  """What one step of a model takes, over all devices.

  Attributes:
    flops: see cost.flops.
    parameters: how many.
    state_bytes: parameters, moments of the optimizer, average.
    kept_bytes: activations that the backward pass keeps.
    carried_bytes: outputs of all layers, which tensor parallelism sums four times in each layer.
    rows: examples of a micro-batch.
    heads: greatest number of devices that can split every layer.
  """

  flops: flops.Flops
  parameters: int
  state_bytes: float
  kept_bytes: float
  carried_bytes: float
  rows: int
  heads: int


@dataclasses.dataclass(frozen=True)
class Choice:
  """A mesh and its predictions.

  Attributes:
    data, fsdp, tensor: its sizes.
    memory: bytes of a device.
    estimate: of the step's time.
    fits: whether the memory is enough.
  """

  data: int
  fsdp: int
  tensor: int
  memory: float
  estimate: Estimate
  fits: bool


def kept(jaxpr) -> tuple[float, float]:
  """Bytes that the forward pass of a traced step keeps, and bytes of its layers' outputs.

  Both are those of the scans over layers, which hold nearly all.
  """
  stacked = carried = 0.0
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    is_backward = 'transpose' in str(equation.source_info.name_stack)
    if equation.primitive.name == 'scan' and not is_backward:
      body = getattr(equation.params['jaxpr'], 'jaxpr', equation.params['jaxpr'])
      for outer, inner in zip(equation.outvars, body.outvars):
        if outer.aval.shape == inner.aval.shape:  # passed from layer to layer
          carried += equation.params['length'] * _bytes(outer)
        else:
          stacked += _bytes(outer)
      continue
    for inner in jaxprs_in_params(equation.params):
      more = kept(inner)
      stacked, carried = stacked + more[0], carried + more[1]
  return stacked, carried


def _bytes(variable):
  return variable.aval.size * variable.aval.dtype.itemsize


def choose(machine: Machine, load: Load, devices: int, per_group: int) -> Choice | None:
  """The mesh with the least predicted step time that fits; if none fits, the one of least memory.

  Of meshes within 2% or 0.1 ms of the best micro-batch, the one that splits parameters least. None
  if the batch does not divide over so many devices.
  """
  every = list(_choices(machine, load, devices, per_group))
  fitting = [one for one in every if one.fits]
  if not fitting:
    return min(every, key=lambda one: one.memory, default=None)
  best = min(one.estimate.step for one in fitting)
  return min((one for one in fitting if one.estimate.step <= max(1.02 * best, best + 1e-4)),
             key=lambda one: (one.fsdp * one.tensor, one.tensor))


def _choices(machine, load, devices, per_group) -> Iterator[Choice]:
  for tensor in _divisors(math.gcd(devices, load.heads)):
    if tensor > per_group:  # sums of activations are too many for a network
      continue
    for fsdp in _divisors(devices // tensor):
      data = devices // tensor // fsdp
      if load.rows % (data * fsdp) == 0:
        yield _predicted(machine, load, data, fsdp, tensor, per_group)


def _divisors(number):
  return [i for i in range(1, number + 1) if number % i == 0]


def _predicted(machine, load, data, fsdp, tensor, per_group):
  devices, split = data * fsdp * tensor, fsdp * tensor
  activations = load.kept_bytes / devices
  # The gradients lie beside the state, in the parameters' dtype.
  memory = (load.state_bytes + 4 * load.parameters) / split + activations * 1.5
  weights = 2 * load.parameters / tensor  # in 16 bits

  def group(size, stride):
    return tuple(range(0, size * stride, stride))

  sent = [
      Collective('all-reduce', weights / fsdp, 1, group(data, split), False),
      Collective('all-gather', weights, 2, group(fsdp, tensor), False),
      Collective('reduce-scatter', weights / fsdp, 1, group(fsdp, tensor), False),
      Collective('all-reduce', 4 * load.carried_bytes / (data * fsdp), 1, group(tensor, 1), False)]
  traffic = _TRAFFIC * activations + _UPDATE * load.parameters / split
  found = Estimate(load.flops.hardware / devices / machine.flops, traffic / machine.bandwidth,
                   sum(seconds(machine, one, per_group) for one in sent))
  usable = min(_USABLE * machine.memory, machine.pool)
  return Choice(data, fsdp, tensor, memory, found, memory <= usable)
