"""Model FLOPs utilisation: how much of a device's peak a training step reaches.

`xmodal bench mfu --config vqa --batch 128 config.model.size=large ...` compiles the
training step of a config as a run does, trains on one batch of its data again and again, and prints
seconds per step (median over rounds), FLOP/s, MFU (arXiv:2204.02311; on devices whose peak is
published), the time of compilation and the peak of memory.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time

from xmodal.bench.harness import changed, check_positive, read_config, run_command


@dataclasses.dataclass
class Prepared:
  """A traced step and one batch for it.

  Attributes:
    plan: a train.plan.Plan.
    traced: see train.programs.trace_step.
    batch: numpy arrays.
    step, create: the compiled step and initialisation of its state; None before `compiled`.
    seconds: of compiling the step, without tracing.
  """

  plan: object
  traced: object
  batch: dict
  step: object = None
  create: object = None
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Result:
  """What one step costs.

  Attributes:
    parameters: how many.
    seconds: of a step, one for each round.
    examples: per step.
    flops: of a step, over all devices, see cost.flops.
    mfu: share (0..1) of the peak; None if the device is unknown.
    compile_seconds: of XLA, without tracing.
    peak_bytes: memory of one device, by the compiler.
    loss: of the last step.
  """

  parameters: int
  seconds: list[float]
  examples: int
  flops: object
  mfu: float | None
  compile_seconds: float
  peak_bytes: int
  loss: float


def prepare(config) -> Prepared:
  """Opens the data, plans the model and traces the first kind of step."""
  from xmodal.sharding import mesh as meshes
  from xmodal.train.plan import Plan
  from xmodal.train.programs import trace_step
  with tempfile.TemporaryDirectory() as folder:
    plan = Plan(config, folder, 'dry_run')
    size = config.train.batch_size
    batch = plan.stream('train').at(plan.sampling.kinds[0].tasks, plan.sampling, 0, size,
                                    meshes.local_rows(plan.mesh, size))
    return Prepared(plan, trace_step(plan), batch)


def compiled(prepared: Prepared) -> Prepared:
  """Compiles the step and its initialisation."""
  from xmodal.train.steps import state as states
  began = time.perf_counter()
  step = prepared.traced.lower().compile()
  return dataclasses.replace(
      prepared, step=step, seconds=time.perf_counter() - began,
      create=states.compile_create(prepared.plan.init, prepared.plan.abstract))


def run(prepared: Prepared, rounds: int, steps: int) -> Result:
  """Trains one step, then times `rounds` rounds of `steps` steps."""
  import jax

  from xmodal.cost import flops, machines
  from xmodal.sharding import mesh as meshes
  from xmodal.train.plan import count
  plan, step = prepared.plan, prepared.step
  size = plan.config.train.batch_size
  state = prepared.create()
  batch = meshes.put_batch(prepared.batch, plan.mesh, size)
  state, metrics = step(state, batch)
  float(metrics['loss'])
  seconds = []
  for _ in range(rounds):
    began = time.perf_counter()
    for _ in range(steps):
      state, metrics = step(state, batch)
    loss = float(metrics['loss'])
    seconds.append((time.perf_counter() - began) / steps)
  counted = flops.count(prepared.traced.jaxpr)
  kinds = [device.device_kind for device in jax.devices()]
  return Result(count(plan.abstract.params), seconds, size, counted,
                machines.utilization(counted.model, statistics.median(seconds), kinds),
                prepared.seconds, step.memory_analysis().peak_memory_in_bytes, loss)


HEAD = (f'{"":34} {"params":>8} {"batch":>6} {"s/step":>8} {"examples/s":>10} {"TFLOP/s":>8} '
        f'{"MFU":>6} {"hardware":>8} {"peak GB":>8} {"compile":>8}')


def row(name: str, result: Result) -> str:
  """A line of the table under HEAD."""
  median = statistics.median(result.seconds)
  mfu = f'{"":>6} {"":>8}'
  if result.mfu is not None:
    mfu = f'{result.mfu:6.1%} {result.mfu * result.flops.hardware / result.flops.model:8.1%}'
  return (f'{name:34} {result.parameters / 1e6:7.1f}M {result.examples:6} {median:8.4f} '
          f'{result.examples / median:10.1f} {result.flops.model / median / 1e12:8.2f} {mfu} '
          f'{result.peak_bytes / 1e9:8.2f} {result.compile_seconds:7.1f}s')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench mfu', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='vqa', help='a config, or the path of one')
  parser.add_argument('--batch', type=int, help="examples per step; default: the config's")
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=10, help='steps per round')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  options = parser.parse_args(argv)
  return run_command(_run, options)


def _run(options):
  check_positive(options, 'batch', 'rounds', 'steps')
  config = changed(read_config(options.config), options.changes)
  if options.batch:
    config.train.batch_size = options.batch
  print(HEAD)
  print(row(options.config, run(compiled(prepare(config)), options.rounds, options.steps)))


if __name__ == '__main__':
  sys.exit(main())
