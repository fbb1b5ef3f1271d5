"""The compiled programs of a run."""

from collections.abc import Callable
import dataclasses
import functools
import time

import jax

from xmodal.cost import flops
from xmodal.cost.machines import FRACTION, SMALLER
from xmodal.errors import UserError
from xmodal.mixer.sampling.sampling import StepKind
from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan
from xmodal.train.steps.gradient_agreement import make_measure
from xmodal.train.steps.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Costs:
  """What the steps of a run cost.

  Attributes:
    flops: model FLOPs of a step over all devices, see cost.flops; one for each kind of step.
    mean_flops: the same per step, by the share of each kind.
    compile_seconds: to trace and compile the steps of all kinds.
    peak_bytes: memory of one device during a step, by the compiler; None: not known.
  """

  flops: tuple[float, ...]
  mean_flops: float
  compile_seconds: float
  peak_bytes: int | None

  def __str__(self):
    memory = f'{scaled(self.peak_bytes)}B per device, ' if self.peak_bytes else ''
    return (f'compiled in {self.compile_seconds:.1f} s; {memory}{scaled(self.mean_flops)}FLOP per '
            'step')

  def numbers(self) -> dict[str, float]:
    """The numbers of final.json; memory in bytes, of one device."""
    found = {'compile_seconds': round(self.compile_seconds, 1),
             'model_flops_per_step': self.mean_flops}
    if self.peak_bytes:
      found['peak_bytes_by_compiler'] = self.peak_bytes
    # None on CPUs.
    measured = [(device.memory_stats() or {}).get('peak_bytes_in_use')
                for device in jax.local_devices()]
    if all(measured):
      found['peak_bytes_by_device'] = max(measured)
    return found


def compile_steps(plan: Plan) -> tuple[list[Callable], Costs]:
  """Compiles the step of each of plan.sampling.kinds, see trace_step."""
  began = time.perf_counter()
  traced = [trace_step(plan, kind) for kind in plan.sampling.kinds]
  steps = [one.lower().compile() for one in traced]
  seconds = time.perf_counter() - began
  peaks = [getattr(step.memory_analysis(), 'peak_memory_in_bytes', None) for step in steps]
  check_memory(max(filter(None, peaks), default=0))
  counted = tuple(flops.count(one.jaxpr).model for one in traced)
  turns = plan.sampling.turns
  mean = sum(counted[kind] * count for kind, count in turns) / sum(count for _, count in turns)
  if plan.teacher is not None:
    steps = [functools.partial(_taught, step, plan.teacher.variables) for step in steps]
  return steps, Costs(counted, mean, seconds, max(peaks) if all(peaks) else None)


def check_memory(peak_bytes: int) -> None:
  """Raises UserError if a step needs more memory than JAX has on a device of this process."""
  # None on CPUs.
  limits = [(device.memory_stats() or {}).get('bytes_limit') for device in jax.local_devices()]
  limit = min(filter(None, limits), default=peak_bytes)
  if peak_bytes > limit:
    raise UserError(f'the step needs {peak_bytes / 1e9:,.1f} GB of memory on each device, and JAX '
                    f'has {limit / 1e9:,.1f}: {SMALLER}; on a GPU, {FRACTION}=0.92 gives it more '
                    'than the usual 0.75 of the memory')


def _taught(step, taught_by, state, batch):
  return step(state, batch, taught_by)


def compile_step(plan: Plan, kind: StepKind | None = None) -> Callable:
  """Compiles a training step for the mesh: (state, batch) -> (state, metrics); see trace_step.

  With a teacher the step takes its variables as a third argument.
  """
  return trace_step(plan, kind).lower().compile()


def trace_step(plan: Plan, kind: StepKind | None = None) -> jax.stages.Traced:
  """Traces a training step for the mesh.

  kind: one of plan.sampling.kinds; None: the first.
  """
  kind, train = kind or plan.sampling.kinds[0], plan.config.train
  shardings = jax.tree.map(lambda x: x.sharding, plan.abstract)
  step = make_train_step(
      plan.model, {name: plan.tasks[name] for name in kind.tasks}, plan.task_weights,
      plan.optimizer, accumulation=train.accumulation, ema_decay=train.ema_decay,
      frozen=plan.frozen, balance=plan.balance, resting=plan.resting[kind],
      shared=plan.shared if plan.balance.needs == 'gradients' else frozenset(),
      schedule=plan.schedule, teacher=plan.teacher)
  more = () if plan.teacher is None else (plan.teacher.abstract,)
  return jax.jit(meshes.over(plan.mesh, step), donate_argnums=0,
                 out_shardings=(shardings, meshes.replicated(plan.mesh))).trace(
                     plan.abstract, _laid_out(plan, plan.batch_of(kind.tasks)), *more)


def compile_measure(plan: Plan) -> Callable:
  """Compiles the comparison of all tasks' gradients: (state, batch) -> metrics."""
  measure = make_measure(
      plan.model, plan.tasks, plan.task_weights, accumulation=plan.config.train.accumulation,
      frozen=plan.frozen, shared=plan.shared)
  return jax.jit(meshes.over(plan.mesh, measure),
                 out_shardings=meshes.replicated(plan.mesh)).lower(
                     plan.abstract, _laid_out(plan, plan.batch)).compile()


def scaled(number):
  """'4.2 G' for 4.2e9."""
  for prefix, factor in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6)):
    if number >= factor:
      return f'{number / factor:.1f} {prefix}'
  return f'{number / 1e3:.1f} k'


def _laid_out(plan, batch):
  sharding = meshes.batch_sharding(plan.mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
