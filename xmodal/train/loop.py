"""The training loop."""

from collections.abc import Callable

from xmodal.sharding import hosts
from xmodal.train.hooks.evaluate import Evaluating
from xmodal.train.hooks.log import Logging
from xmodal.train.hooks.measure import Measuring
from xmodal.train.hooks.profile import Profiling
from xmodal.train.hooks.save import Saving
from xmodal.train.logs.report import Report
from xmodal.train.plan import Plan
from xmodal.train.process.stop import Stop
from xmodal.train.programs import compile_steps


def run_steps(plan: Plan, state, next_batch: Callable[[], dict], evaluating: Evaluating,
              saving: Saving, profiling: Profiling, report: Report, stop: Stop):
  """Trains from a state to the last step; saves, evaluates and logs.

  Args:
    plan: the plan of the run.
    state: TrainState to start from.
    next_batch: returns the next step's batch, on the devices.
    evaluating, saving, profiling, report: hooks of the loop, see train.hooks.
    stop: ends the run early.

  Returns:
    (last state, whether the run finished). A stopped run returns False; its state is saved.
  """
  start, last, best = int(state.step), plan.config.train.steps, plan.best
  if start >= last or best.is_exhausted:
    return state, evaluating.run(plan.evaluations, state, stop)
  with report.pause(start):
    overdue = [name for name in plan.evaluations if hosts.agreed(name in report.overdue)]
    if not evaluating.run(overdue, state, stop):
      return state, False
    steps, costs = compile_steps(plan)
    report.compiled(costs, plan.sampling)
    measure = Measuring(plan, start)
  logging = Logging(plan, report, int(state.skipped))
  for step in range(start + 1, last + 1):
    kind = plan.sampling.kind(step - 1)
    profiling.before(step, state)
    with report.speed.waiting(state.step):
      batch = next_batch()
    measured = measure(step, state, batch)
    state, metrics = steps[kind](state, batch)
    logging.add(step, metrics | measured)
    stopping, due = stop.reached(), evaluating.due(step)
    saves, traced = stopping or saving.is_due(step), profiling.after(step)
    if due or saves or traced:
      logging.finish()
      with report.pause(step):
        if traced:
          profiling.finish(state)
        if saves:
          saving.save(state)
    if stopping:
      return state, False
    if due:
      with report.pause(step):
        if not evaluating.run(due, state, stop):
          return state, False
    if best.is_exhausted and (due or step == last):
      report.say(f'no better score for {plan.config.train.patience} evaluations: training ends; '
                 f'the best is {best}')
      saving.save(state)
      others = [name for name in plan.evaluations if name not in due]
      return state, evaluating.run(others, state, stop)
  return state, True
