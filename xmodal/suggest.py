"""Suggests a mesh for any number of devices, and predicts memory and time, without compiling."""

import math

import jax

from xmodal.cost import flops, machines, scaling
from xmodal.errors import UserError, did_you_mean
from xmodal.train.plan import Plan, count
from xmodal.train.programs import scaled, trace_step

DEVICES = tuple(2 ** i for i in range(13))
# Chips of the largest slice: beyond it, slices are joined by a network.
_SLICE = {'v4': 4096, 'v5e': 256, 'v5p': 4096, 'v6e': 256}


def report(config, machine_name: str) -> str:
  """A table: for 1 to 4,096 devices the mesh, its predicted memory, step time and MFU, and why.

  Raises:
    UserError: the machine is unknown.
  """
  if machine_name not in machines.MACHINES:
    raise UserError(f'--topology={machine_name}: no machine of this name'
                    f'{did_you_mean(machine_name, machines.MACHINES)}; known are '
                    f'{", ".join(machines.MACHINES)}')
  machine, load = machines.MACHINES[machine_name], load_of(config)
  lines = [
      f'{load.parameters / 1e6:,.1f}M parameters, batch {config.train.batch_size} in '
      f'{config.train.accumulation} micro-batches: {scaled(load.flops.model)}FLOP a step; '
      f'state {scaled(load.state_bytes)}B, activations {scaled(load.kept_bytes)}B',
      f'{machine_name}: {machine.flops / 1e12:,.0f} TFLOP/s, {machine.memory / 1e9:,.0f} GB',
      '',
      f'{"devices":>7} {"data":>5} {"fsdp":>5} {"tensor":>6} {"GB each":>9} {"step ms":>9} '
      f'{"MFU":>5}  limit']
  for devices in DEVICES:
    per_group = machine.per_host or _SLICE[machine_name]
    chosen = scaling.choose(machine, load, devices, per_group)
    if chosen is None:
      lines.append(f'{devices:7} the batch does not divide over so many: {load.rows} examples of a '
                   f'micro-batch, at most {load.heads} parts of a layer')
      continue
    step = chosen.estimate.step * config.train.accumulation
    mfu = load.flops.model / devices / machine.flops / step
    lines.append(
        f'{devices:7} {chosen.data:5} {chosen.fsdp:5} {chosen.tensor:6} '
        f'{chosen.memory / 1e9:9,.2f} {1e3 * step:9,.2f} {mfu:5.0%}  '
        f'{chosen.estimate.limit if chosen.fits else "does not fit"}')
  return '\n'.join([*lines, '', 'Times are lower bounds from published figures, with collectives '
                    'beside the rest; `xmodal compile` knows the compiled program.'])


def load_of(config) -> scaling.Load:
  """What a step of a config takes on an accelerator, by tracing it on this machine."""
  config = config.copy_and_resolve_references()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
  if config.model.dtype == 'auto':
    config.model.dtype = 'bfloat16'
  if config.model.remat == 'auto':
    config.model.remat = 'dots'
  plan = Plan(config, 'plan', 'dry_run')
  traced = trace_step(plan)
  kept, carried = scaling.kept(traced.jaxpr)
  counted, micro = flops.count(traced.jaxpr), config.train.accumulation
  heads = math.gcd(*(module.num_heads for module in _parts(plan.model.backbone)))
  return scaling.Load(
      flops.Flops(*(value / micro for value in counted)), count(plan.abstract.params),
      sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract)), kept, carried,
      config.train.batch_size // micro, heads)


def _parts(backbone):
  return [module for module in (backbone.vision_tower, backbone.text_tower, backbone.cross_modal,
                                 *backbone.more_towers.values())
          if hasattr(module, 'num_heads')]
