"""The compiled programs of a run."""

from collections.abc import Callable

import jax

from xmodal.mixer.sampling.sampling import StepKind
from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan
from xmodal.train.steps.agreement import make_measure
from xmodal.train.steps.step import make_train_step


def compile_step(plan: Plan, kind: StepKind | None = None) -> Callable:
  """Compiles a training step for the mesh: (state, batch) -> (state, metrics); see trace_step."""
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
      frozen=plan.frozen, balance=plan.balance, resting=plan.resting[kind], shared=plan.shared)
  return jax.jit(meshes.over(plan.mesh, step), donate_argnums=0,
                 out_shardings=(shardings, meshes.replicated(plan.mesh))).trace(
                     plan.abstract, _laid_out(plan, plan.batch_of(kind.tasks)))


def compile_measure(plan: Plan) -> Callable:
  """Compiles the comparison of all tasks' gradients: (state, batch) -> metrics."""
  measure = make_measure(
      plan.model, plan.tasks, plan.task_weights, accumulation=plan.config.train.accumulation,
      frozen=plan.frozen, shared=plan.shared)
  return jax.jit(meshes.over(plan.mesh, measure),
                 out_shardings=meshes.replicated(plan.mesh)).lower(
                     plan.abstract, _laid_out(plan, plan.batch)).compile()


def _laid_out(plan, batch):
  sharding = meshes.batch_sharding(plan.mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
