"""Seconds a step of tasks together, over those of each alone and over the plain sum."""

from collections.abc import Mapping, Sequence
import gc
import statistics

from xmodal.bench.compare import measure
from xmodal.bench.multitask_table import markdown
from xmodal.sharding import mesh as meshes
from xmodal.train.programs import compile_step
from xmodal.train.steps import state as states


class Step:
  """One kind of step of a run, on one batch: call it for (loss, gradient norm)."""

  def __init__(self, run, kind):
    """Compiles; run: a train.plan.Plan, kind: of its sampling."""
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
  """Ratios within rounds that run kinds of step in turn, the plain sum always among them.

  Args:
    alone: a Plan of each task.
    balances: one of all tasks in each step by balance, 'fixed' among them.
    samplings: one of all tasks by other samplings.
    rounds: of which medians are taken.
    steps: of each kind in a round.

  Returns:
    {what: {'seconds': median, 'ratio': [median, lowest, highest], 'over': of what}}. Of a sampling
    it is the time in which each task gets one batch, on average over a cycle.
  """
  plain = Step(balances['fixed'], balances['fixed'].sampling.kinds[0])

  def measured(ways):
    # Some at a time: a program on a CPU is thousands of mappings, of which Linux allows a process
    # 65,530, and all kinds of step together would have more.
    gc.collect()
    ways = {'fixed': plain, **{name: Step(run, kind) for name, (run, kind) in ways.items()}}
    measure(ways, 1, 1)  # whatever is done once
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
  if samplings:  # many have the same kinds of step, and one model
    seconds = measured({kind: (run, kind) for run in samplings.values()
                        for kind in run.sampling.kinds})
  for name, run in samplings.items():
    found[name] = _figures(_of_sampling(run.sampling, seconds, len(alone)), seconds['fixed'],
                           'fixed')
  return found


def _of_sampling(sampling, seconds, num_tasks):
  """By round, the seconds in which each task gets one batch."""
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
  """What measure_cost found; Markdown."""
  return markdown(['step', 'seconds', 'ratio', 'lowest', 'highest', 'over'], [
      [name, f'{figures["seconds"]:.4f}', *(f'{x:.3f}' for x in figures.get('ratio', ())),
       *([figures['over']] if 'over' in figures else [''] * 4)]
      for name, figures in found.items()])
