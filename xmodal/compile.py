"""Compiles the training step of a config for machines that are not attached: what it costs."""

from collections.abc import Iterator
import dataclasses
import math
import re
import time

import jax

from xmodal.cost import estimate, flops, hlo, machines, topology
from xmodal.cost.machines import FRACTION, SMALLER
from xmodal.errors import UserError
from xmodal.train.describe import bytes_on_one
from xmodal.train.plan import Plan, count
from xmodal.train.programs import trace_step


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step.

  Attributes:
    mesh: sizes of the mesh by axis.
    parameters: how many.
    flops: of a step, over all devices.
    cost: of one device.
    bytes: of one device by what they hold: 'parameters', 'optimizer', 'other state', 'batch', and
      the most that the step needs besides, 'temporaries'.
    peak_bytes: of one device, at most during the step.
    seconds: that compiling took, tracing included.
    estimate: of the step's time.
    machine: figures of one device.
    per_group: devices that fast links connect.
    tasks: that the step trains.
  """

  mesh: dict[str, int]
  parameters: int
  flops: flops.Flops
  cost: hlo.Cost
  bytes: dict[str, int]
  peak_bytes: int
  seconds: float
  estimate: estimate.Estimate
  machine: machines.Machine
  per_group: int
  tasks: tuple[str, ...] = ()

  @property
  def devices(self) -> int:
    """Number of devices."""
    return math.prod(self.mesh.values())


def compile_for(config, topology_name: str, slices: int = 1) -> Iterator[Compiled]:
  """Compiles each kind of step of a config for a topology, one after the other.

  Raises:
    UserError: the topology or the config is unusable, or the compiler finds that the step does not
      fit into the devices' memory.
  """
  devices = topology.devices_of(topology_name, slices)
  machine = machines.MACHINES[topology.split(topology_name)[0]]
  per_group = machine.per_host or len(devices) // slices
  if machine.per_host and topology_name.count('x'):
    per_group = topology.split(topology_name)[1][1]
  with topology.compiling_for(devices):
    plan = Plan(config, 'compile', 'dry_run')
    for kind in plan.sampling.kinds:
      yield _compile(plan, kind, topology_name, machine, per_group)


def _compile(plan, kind, topology_name, machine, per_group):
  began = time.perf_counter()
  traced = trace_step(plan, kind)
  try:
    step = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    raise _too_large(topology_name, error) from error
  seconds = time.perf_counter() - began
  cost, counted = hlo.cost(step.as_text()), flops.count(traced.jaxpr)
  memory = step.memory_analysis()
  peak = getattr(memory, 'peak_memory_in_bytes', 0) or (
      memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
      - memory.alias_size_in_bytes)
  state = plan.abstract
  parts = {'parameters': bytes_on_one(state.params), 'optimizer': bytes_on_one(state.opt_state)}
  parts['other state'] = bytes_on_one(state) - sum(parts.values())
  parts['batch'] = memory.argument_size_in_bytes - sum(parts.values())
  parts['temporaries'] = peak - memory.argument_size_in_bytes
  return Compiled(dict(plan.mesh.shape), count(state.params), counted, cost, parts, peak, seconds,
                  estimate.step(machine, counted.hardware / plan.mesh.size, cost, per_group),
                  machine, per_group, kind.tasks)


def _too_large(name, error):
  text = ' '.join(str(error).split())
  if 'RESOURCE_EXHAUSTED' not in text:
    return error
  sizes = re.search(r'\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|'
                    r'Used ([\d.]+\w) of ([\d.]+\w) hbm', text)
  found = ' of '.join(filter(None, sizes.groups())) if sizes else text[:200]
  return UserError(f'--topology={name}: the step does not fit into the memory of a device '
                   f'({found}): {SMALLER}')


def report(name: str, found: Compiled) -> str:
  """A text that says what a compiled step costs."""
  machine, counted, guess = found.machine, found.flops, found.estimate
  mesh = ' x '.join(f'{axis} {size}' for axis, size in found.mesh.items())
  lines = [
      f'{name}: {found.devices} devices, mesh {mesh}; {found.parameters / 1e6:,.1f}M parameters; '
      f'step of {", ".join(found.tasks)}, compiled in {found.seconds:.0f} s',
      'memory of a device: ' + ', '.join(
          f'{kind} {size / 1e9:,.2f}' for kind, size in found.bytes.items()) +
      f', together at most {found.peak_bytes / 1e9:,.2f} of {machine.memory / 1e9:,.2f} GB',
      f'FLOPs of a step: model {counted.model:.4g}, hardware {counted.hardware:.4g}, which is '
      f'{counted.hardware / found.devices:.4g} a device',
      f'kernels of a device: {found.cost.kernels:,}; matrix products move '
      f'{found.cost.product_bytes / 1e9:,.1f} GB, others {found.cost.other_bytes / 1e9:,.1f} GB',
      'collectives of a device, with the bytes of their results:']
  kinds = estimate.by_kind(found.cost.collectives)
  lines += [f'  {kind:20} {times:6,} times {size / 1e9:10,.3f} GB'
            for kind, (times, size) in sorted(kinds.items())] or ['  none']
  if waits := sum(one.times for one in found.cost.collectives if one.in_condition):
    lines.append(f'  {waits:,} of them decide whether a loop goes on: all devices wait there')
  mfu = counted.model / found.devices / machine.flops / guess.step
  lines.append(f'predicted step: {guess.step * 1e3:,.1f} ms or more, MFU {mfu:.0%} or less; at '
               f'published rates compute takes {guess.compute * 1e3:,.1f} ms, memory '
               f'{guess.memory * 1e3:,.1f} ms, links {guess.links * 1e3:,.1f} ms: bound by '
               f'{guess.limit}')
  return '\n'.join(lines)


def check_fits(name: str, found: Compiled) -> None:
  """Raises UserError if a step needs more memory than a device has; TPU compilers do it earlier."""
  machine = found.machine
  if found.peak_bytes > machine.pool:
    more = '' if machine.pool == machine.memory else (
        f', of which JAX takes {machine.pool / 1e9:,.1f} ({FRACTION} changes that)')
    raise UserError(
        f'--topology={name}: the step needs {found.peak_bytes / 1e9:,.1f} GB of memory on each '
        f'device, which has {machine.memory / 1e9:,.1f}{more}: {SMALLER}')
