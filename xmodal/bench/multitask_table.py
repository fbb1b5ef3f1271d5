"""Results of finished runs of bench.multitask: scores of each task over the seeds, and tables."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import os
import statistics

from xmodal.train.logs import metrics

# A task's scores at its evaluations: [(step, score), ...].
Curve = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results of one finished run.

  Attributes:
    curves: task -> its curve.
    pictures_per_second: training speed; a picture that several tasks share counts once.
  """

  curves: Mapping[str, Curve]
  pictures_per_second: float


def read_outcome(workdir: str, scores: Mapping[str, str]) -> Outcome | None:
  """Reads a run's folder; None if it has not ended. scores: main_score of each task."""
  if not os.path.exists(os.path.join(workdir, 'final.json')):
    return None
  curves, rates = {task: [] for task in scores}, []
  for line in metrics.read(os.path.join(workdir, 'metrics.jsonl'))[0]:
    task = line['task']
    if line['split'] == 'train' and task == 'all':
      rates.append(line['examples_per_second'])
    elif line['split'] == 'eval' and line.get(scores.get(task)) is not None:
      curves[task].append((line['step'], line[scores[task]]))
  return Outcome({task: curve for task, curve in curves.items() if curve},
                 statistics.median(rates))


def summarise(outcomes: Sequence[Outcome]) -> dict:
  """Summarises the seeds of one setting, as plain values for a JSON file.

  'final' has each task's final scores; 'mean' and 'spread' (maximum minus minimum; None for one
  seed) are computed from them, and 'curve' is the mean at each evaluation.
  """
  tasks = [task for task in outcomes[0].curves if all(task in o.curves for o in outcomes)]
  final = {task: [o.curves[task][-1][1] for o in outcomes] for task in tasks}
  return {
      'seeds': len(outcomes), 'final': final,
      'mean': {task: statistics.fmean(numbers) for task, numbers in final.items()},
      'spread': {task: max(numbers) - min(numbers) if len(numbers) > 1 else None
                 for task, numbers in final.items()},
      'curve': {task: _mean_curve([o.curves[task] for o in outcomes]) for task in tasks},
      'pictures_per_second': statistics.median(o.pictures_per_second for o in outcomes)}


def _mean_curve(curves):
  steps = [step for step, _ in curves[0] if all(step in dict(curve) for curve in curves)]
  return [[step, statistics.fmean(dict(curve)[step] for curve in curves)] for step in steps]


def compare(together: Mapping, alone: Mapping[str, Mapping]) -> dict:
  """Compares the summary of a multitask setting with those of its tasks alone.

  Returns:
    'reached': task -> step of the first evaluation whose mean reaches the single-task final mean,
    or None. 'above' and 'below': tasks whose final mean differs from the single-task one by more
    than the larger of the two spreads; neither if either has only one seed.
  """
  reached, above, below = {}, [], []
  for task in together['mean']:
    if task not in alone or task not in alone[task]['mean']:
      continue
    goal = alone[task]['mean'][task]
    reached[task] = next((step for step, mean in together['curve'][task] if mean >= goal), None)
    spreads = together['spread'][task], alone[task]['spread'][task]
    difference = together['mean'][task] - goal
    if None not in spreads and abs(difference) > max(spreads):
      (above if difference > 0 else below).append(task)
  return {'reached': reached, 'above': above, 'below': below}


def main_table(settings: Sequence[Mapping], scores: Mapping[str, str]) -> str:
  """Formats summaries with 'name', 'steps', 'batches' and the result of `compare` as Markdown."""
  tasks = list(scores)
  rows = []
  for setting in settings:
    batches = [setting['batches'][task] for task in tasks if task in setting['batches']]
    rows.append([
        setting['name'], setting['steps'],
        '-'.join(map(str, dict.fromkeys((min(batches), max(batches))))),
        setting['seeds'], *(_number(setting, task) for task in tasks),
        f'{setting["pictures_per_second"]:.0f}',
        *(', '.join(setting[key]) if key in setting and setting['seeds'] > 1 else ''
          for key in ('above', 'below'))])
  ends = markdown(['setting', 'steps', 'batches a task', 'seeds',
                   *(f'{task} {scores[task]}' for task in tasks), 'pictures/s', 'above alone',
                   'below alone'], rows)
  reached = markdown(['setting', 'steps', *tasks], [
      [s['name'], s['steps'], *(_reached(s, task) for task in tasks)]
      for s in settings if 'reached' in s])
  return (f'{ends}\n\nMean over the seeds (maximum minus minimum). Above, below: the mean differs '
          'from the single-task mean by more than the larger of the two spreads.\n\nStep of the '
          f'first evaluation that reaches the single-task final score:\n\n{reached}')


def _number(summary, task):
  if task not in summary['mean']:
    return ''
  spread = summary['spread'][task]
  return f'{summary["mean"][task]:.3f}' + ('' if spread is None else f' ({spread:.3f})')


def _reached(summary, task):
  if task not in summary['reached']:
    return ''
  step = summary['reached'][task]
  return 'never' if step is None else step


def labels_table(settings: Sequence[Mapping]) -> str:
  """Formats VQA accuracy by 'answers_share', alone and together, as Markdown."""
  shares = sorted({s['answers_share'] for s in settings}, reverse=True)
  cells = {(s['answers_share'], s['together']): _number(s, 'vqa') for s in settings}
  return markdown(
      ['answers', 'vqa alone', 'with all tasks'],
      [[f'{share:.0%}', *(cells.get((share, together), '') for together in (False, True))]
       for share in shares])


def markdown(head: Sequence, rows: Iterable[Sequence]) -> str:
  """A Markdown table."""
  return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |'
                   for row in (head, ['---'] * len(head), *rows))
