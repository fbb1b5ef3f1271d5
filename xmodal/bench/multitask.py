"""Compares multitask training with each task trained alone.

`xmodal bench multitask [--steps 1000] [--seeds 3] [--tasks vqa,detection] ...`
trains configs/multitask_shared.py, one run after another, each in its own folder below --workdir.
Repeating the command skips finished runs and resumes a stopped one. After each run it rewrites
the table, table.md, and all numbers, results.json.

Runs, each with every seed:
  TASK alone           --steps steps of one task, one batch per step
  SAMPLING, BALANCE    all tasks: the plain sum (joint, fixed), each sampling with fixed weights,
                       each balance with joint sampling
If every step trains all tasks, equal steps also mean equal examples. If a step trains one of k
tasks, --steps steps give each task a k-th of the batches on average. A second run of k times
--steps then gives as many batches as alone: exactly with round_robin, by data set size with
proportional and temperature ('batches a task': fewest and most). It is a run of its own because
the learning rate decays to the end of each run. Scores are each task's main_score, on the same
validation examples in all runs.

--cost measures the time of a step instead. --labels measures VQA accuracy with 100, 30, 10 and 3%
of the answers, alone and with the other tasks, which keep all pictures. VQA batches hold answered
questions only, so fewer answers are repeated more often.
"""

import argparse
import dataclasses
import json
import os
import sys

from flax import traverse_util

from xmodal import config as configs
from xmodal import heap, paths
from xmodal.bench import multitask_cost, multitask_table
from xmodal.bench.harness import check_positive, read_config, run_command
from xmodal.bench.multitask_plan import Setting, label_settings, main_settings
from xmodal.errors import UserError
from xmodal.mixer.sampling.sampling import SAMPLINGS
from xmodal.tasks.task import TASKS
from xmodal.train import build
from xmodal.train.process import stop

BALANCES = ('fixed', 'uncertainty', 'dwa', 'gradnorm', 'pcgrad', 'famo')


def train(config, workdir: str) -> bool:
  """Trains a run to its end, unless it is finished; False if it was stopped."""
  import jax

  from xmodal.train import run as runs
  from xmodal.train.plan import Plan
  if os.path.exists(os.path.join(workdir, 'final.json')):
    _check_same(build.resolve(config, {}), workdir)
    return True
  print(f'\n{workdir}', flush=True)
  done = bool(runs.train(Plan(config, workdir)))
  jax.clear_caches()  # other runs do not use these programs
  return done


def _check_same(config, workdir):
  now, then = (traverse_util.flatten_dict(json.loads(c.to_json()), sep='.')
               for c in (config, configs.load(os.path.join(workdir, 'config.json'))))
  if changed := sorted(key for key in now if now[key] != then.get(key)):
    key = changed[0]
    raise UserError(f'{workdir} was run with another config ({key}={then.get(key)!r} there and '
                    f'{now[key]!r} here): choose another --workdir, or delete that folder')


def summaries(settings, base, seeds: int, workdir: str) -> list[dict]:
  """A summary of the scores of each setting that has a finished run."""
  found = []
  for setting in settings:
    scores = _scores(setting.tasks)
    outcomes = [outcome for seed in range(seeds) if (outcome := multitask_table.read_outcome(
        os.path.join(workdir, setting.folder(seed)), scores))]
    if not outcomes:
      continue
    order = setting.order(base)
    found.append({
        'name': setting.name, **dataclasses.asdict(setting), 'together': setting.together,
        'batches': {task: order.count_steps((task,), setting.steps) for task in setting.tasks},
        **multitask_table.summarise(outcomes)})
  alone = {(s['tasks'][0], s['answers_share']): s for s in found if not s['together']}
  return [s | multitask_table.compare(s, {
      task: alone[task, s['answers_share']] for task in s['tasks']
      if (task, s['answers_share']) in alone}) if s['together'] else s for s in found]


def _scores(tasks):
  return {task: score for task in tasks if (score := TASKS[task].make.main_score)}


def write_table(workdir: str, name: str, table: str, **results) -> None:
  """Adds results to a folder's results.json, and writes a table beside it."""
  path = os.path.join(workdir, 'results.json')
  os.makedirs(workdir, exist_ok=True)
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      results = json.load(f) | results
  with open(f'{path}.part', 'w', encoding='utf-8') as f:
    json.dump(results, f, indent=2)
  os.replace(f'{path}.part', path)
  with open(os.path.join(workdir, name), 'w', encoding='utf-8') as f:
    f.write(f'{table}\n')


def _train_all(base, options):
  """Trains missing runs and prints the table; returns an exit code, None for 0."""
  if options.labels:
    settings, notes = label_settings(base, options.steps), []
  else:
    settings, notes = main_settings(base, options.steps, options.samplings, options.balances)
  total, done = len(settings) * options.seeds, 0

  def write():
    found = summaries(settings, base, options.seeds, options.workdir)
    if options.labels:
      table = multitask_table.labels_table(found)
      write_table(options.workdir, 'labels.md', table, labels=found)
    else:
      table = multitask_table.main_table(found, _scores(base.mixer.tasks))
      write_table(options.workdir, 'table.md', table, settings=found)
    return '\n\n'.join([table, *notes])

  # Seed by seed, so that a partial table already has all settings.
  for seed in range(options.seeds):
    for setting in settings:
      workdir = os.path.join(options.workdir, setting.folder(seed))
      if not train(setting.config(base, seed), workdir):
        tables = f', results in {options.workdir}' if done else ''
        print(f'stopped after {done} of {total} runs{tables}; the same command goes on')
        return stop.EXIT_CODE
      done += 1
      table = write()
  print(f'\n{table}\n\nin {options.workdir}: results.json, and a folder per run')


def _cost(base, options):
  """Measures seconds per step and prints the table."""
  import jax

  from xmodal.train.plan import Plan
  tasks = tuple(base.mixer.tasks)
  if len(tasks) == 1:
    raise UserError(f'--cost compares tasks together with each alone, found {tasks[0]} only')

  def run(setting):
    return Plan(setting.config(base, 0), options.workdir)  # nothing is written there

  found = multitask_cost.measure_cost(
      {task: run(Setting((task,), options.steps)) for task in tasks},
      {name: run(Setting(tasks, options.steps, balance=name))
       for name in dict.fromkeys(('fixed', *options.balances))},
      {name: run(Setting(tasks, options.steps, sampling=name))
       for name in options.samplings if name != 'joint'}, options.rounds, options.round_steps)
  table = multitask_cost.cost_table(found)
  write_table(options.workdir, 'cost.md', table, cost=found)
  print(f'batch {base.train.batch_size}, {options.rounds} rounds, {jax.device_count()} x '
        f'{jax.devices()[0].device_kind}\n\n{table}')


def _chosen(flag, text, known):
  names = tuple(dict.fromkeys(text.split(',')))
  if unknown := set(names) - set(known):
    raise UserError(f'--{flag}: {min(unknown)!r} is none of {",".join(known)}')
  return names


def _base(options):
  """The base config of all runs, restricted to the chosen tasks."""
  base = read_config(options.config)
  known = tuple(base.mixer.tasks)
  weights = build.task_weights(base)
  chosen = _chosen('tasks', options.tasks, known) if options.tasks else known
  base.mixer.tasks = tuple(task for task in known if task in chosen)
  base.mixer.weights = tuple(weights[task] for task in base.mixer.tasks)
  if options.fast:
    base.data.eval_examples = min(base.data.eval_examples, 300)
  configs.check(base)
  return base


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/bench_multitask')
  parser.add_argument('--config', default='multitask_shared',
                      help='config of the model, data and tasks')
  parser.add_argument('--steps', type=int, help='default 1000; with --fast 200')
  parser.add_argument('--seeds', type=int, help='default 3; with --fast 1')
  parser.add_argument('--tasks', help="some of the config's tasks, comma-separated")
  parser.add_argument('--samplings', help='default: all; with --fast joint,round_robin')
  parser.add_argument('--balances', help='default: all; with --fast fixed,uncertainty')
  parser.add_argument('--fast', action='store_true', help='fewer steps, seeds and settings')
  parser.add_argument('--cost', action='store_true', help='measure seconds per step')
  parser.add_argument('--rounds', type=int, default=7, help='rounds of --cost')
  parser.add_argument('--round-steps', type=int, default=3,
                      help='steps of each kind per round of --cost')
  parser.add_argument('--labels', action='store_true', help='score VQA with fewer answers')
  options = parser.parse_args(arguments)
  return run_command(_run, options)


def _run(options):
  fast = options.fast
  options.steps = (200 if fast else 1000) if options.steps is None else options.steps
  options.seeds = (1 if fast else 3) if options.seeds is None else options.seeds
  check_positive(options, 'steps', 'seeds', 'rounds', 'round_steps')
  options.samplings = _chosen(
      'samplings', options.samplings or ('joint,round_robin' if fast else ','.join(SAMPLINGS)),
      SAMPLINGS)
  options.balances = _chosen(
      'balances', options.balances or ('fixed,uncertainty' if fast else ','.join(BALANCES)),
      BALANCES)
  options.workdir = paths.local(options.workdir, '--workdir')
  base = _base(options)

  from xmodal.main import give_threads, use_two_cores
  from xmodal.train.process.compilation_cache import enable_compilation_cache
  use_two_cores(base)
  give_threads()
  enable_compilation_cache()
  return (_cost if options.cost else _train_all)(base, options)


if __name__ == '__main__':
  heap.keep_memory()
  sys.exit(main())
