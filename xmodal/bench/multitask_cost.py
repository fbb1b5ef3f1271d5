"""Seconds per multitask step, relative to the single-task steps and to the plain sum."""

from collections.abc import Mapping, Sequence
import gc
import statistics

from xmodal.bench.harness import measure
from xmodal.bench.multitask_table import markdown
from xmodal.sharding import mesh as meshes
from xmodal.train.programs import compile_step
from xmodal.train.steps import state as states


class Step:
  """One kind of step of a run, on one batch; a call returns (loss, gradient norm)."""

  def __init__(self, run, kind):
    """Compiles the step; run: a train.plan.Plan, kind: one of its sampling's kinds."""
    size = run.config.train.batch_size
    batch = run.stream('train').at(kind.tasks, run.sampling, 0, size)
    self._batch = meshes.put_batch(batch, run.mesh, size)
    self._step = compile_step(run, kind)
    self._state = states.create(run.init, run.abstract)

  def __call__(self):
    self._state, metrics = self._step(self._state, self._batch)
    return metrics['loss'], metrics['gradient_norm']


def measure_cost(alone: Mapping[str, object], balances: Mapping[str, object],
                 samplings: Mapping[str, object], rounds: int, steps: int) -> dict[str, dict]:
  """Time ratios within rounds that run the kinds of step in turn, always including the plain sum.

  Args:
    alone: task -> its single-task Plan.
    balances: balance -> a Plan of all tasks in each step; 'fixed' must be one of them.
    samplings: sampling -> a Plan of all tasks.
    rounds: number of rounds; results are medians over them.
    steps: steps of each kind per round.

  Returns:
    {name: {'seconds': median, 'ratio': [median, lowest, highest], 'over': the denominator}}. For a
    sampling, seconds are the time in which each task gets one batch, averaged over a cycle.
  """
  plain = Step(balances['fixed'], balances['fixed'].sampling.kinds[0])

  def measured(ways):
    # A few kinds at a time: a CPU program takes thousands of memory mappings, all kinds together
    # more than the 65,530 that Linux allows a process.
    gc.collect()
    ways = {'fixed': plain, **{name: Step(run, kind) for name, (run, kind) in ways.items()}}
    measure(ways, 1, 1)  # warm-up
    return measure(ways, rounds, steps)

  singles = {f'{task} alone': (run, run.sampling.kinds[0]) for task, run in alone.items()}
  seconds = measured(singles)
  sums = [sum(times) for times in zip(*(seconds[name] for name in singles))]
  found = {name: _figures(seconds[name]) for name in singles}
  found['fixed'] = _figures(seconds['fixed'], sums, 'sum of those alone')
  for balance, run in balances.items():
    if balance != 'fixed':
      seconds = measured({balance: (run, run.sampling.kinds[0])})
      found[balance] = _figures(seconds[balance], seconds['fixed'], 'fixed')
  if samplings:  # many samplings share kinds of step, and all share the model
    seconds = measured({kind: (run, kind) for run in samplings.values()
                        for kind in run.sampling.kinds})
  for name, run in samplings.items():
    found[name] = _figures(_of_sampling(run.sampling, seconds, len(alone)), seconds['fixed'],
                           'fixed')
  return found


def _of_sampling(sampling, seconds, num_tasks):
  """For each round, the seconds in which each task gets one batch."""
  counts = {kind: sum(steps for i, steps in sampling.turns if i == number)
            for number, kind in enumerate(sampling.kinds)}
  batches = sum(count * len(kind.tasks) for kind, count in counts.items())
  return [sum(count * second for count, second in zip(counts.values(), of_round))
          * num_tasks / batches for of_round in zip(*(seconds[kind] for kind in counts))]


def _figures(seconds: Sequence[float], others: Sequence[float] = (), over: str = '') -> dict:
  found = {'seconds': statistics.median(seconds)}
  if others:
    ratios = [a / b for a, b in zip(seconds, others)]
    found |= {'ratio': [statistics.median(ratios), min(ratios), max(ratios)], 'over': over}
  return found


def cost_table(found: Mapping[str, Mapping]) -> str:
  """Formats the result of measure_cost as Markdown."""
  return markdown(['step', 'seconds', 'ratio', 'lowest', 'highest', 'over'], [
      [name, f'{figures["seconds"]:.4f}', *(f'{x:.3f}' for x in figures.get('ratio', ())),
       *([figures['over']] if 'over' in figures else [''] * 4)]
      for name, figures in found.items()])
