"""Compares runs initialised from an earlier run with runs from scratch.

`xmodal bench start_from [--first vqa] [--then detection,vqa_rad] [--root DIR] ...`
trains configs/vqa.py once, then each other config twice per seed: from scratch, and with that run
as config.train.start_from. Both have the same sizes, steps, data and seeds; the run from scratch
trains its own tokenizer. --root is the data folder for configs that need one (VQA-RAD); without it
they are left out.

Repeating the command skips finished runs and resumes a stopped one. The table is table.md, and all
numbers are results.json, both in --workdir.
"""

import argparse
from collections.abc import Mapping
import os
import sys

from xmodal import heap, paths
from xmodal.bench.harness import check_positive, read_config, run_command
from xmodal.bench.multitask import train, write_table
from xmodal.bench.multitask_table import compare, markdown, read_outcome, summarise
from xmodal.data.sources.source import SOURCES
from xmodal.tasks.task import TASKS
from xmodal.train.process import stop
from xmodal.train.start.earlier import open_earlier

# Changes to both runs of a config. With another patch size, the stem would be newly initialised.
_CHANGES = {'vqa_rad': {'model.vision.patch_size': None}}
_EVALUATIONS = 4
_ROWS = {'nothing': 'from scratch', 'start': 'from the run'}


def pair(base, first: str, steps: int | None) -> dict[str, object]:
  """The configs of a run from scratch and of one initialised from another, without seed.

  Args:
    base: config of both.
    first: workdir of the earlier run.
    steps: None: the config's steps.
  """
  c = _shortened(base, steps)
  c.train.eval_every = c.train.checkpoint_every = -(-c.train.steps // _EVALUATIONS)
  c.train.start_from = first
  begun = open_earlier(c.train).resolve(c)
  alone = begun.copy_and_resolve_references()
  alone.train.start_from = ''
  return {'nothing': alone, 'start': begun}


def _shortened(base, steps):
  c = base.copy_and_resolve_references()
  c.train.steps = steps or c.train.steps
  c.train.samples = 0
  c.optimizer.warmup_steps = min(c.optimizer.warmup_steps, c.train.steps // 10)
  return c


def table(found: Mapping[str, Mapping[str, Mapping]]) -> str:
  """Formats {config: {row: summary}} as Markdown; see multitask_table.summarise."""
  lines = []
  for name, rows in found.items():
    against = compare(rows['start'], dict.fromkeys(rows['nothing']['mean'], rows['nothing'])) if (
        len(rows) == 2) else {}
    for row, summary in rows.items():
      for task, curve in summary['curve'].items():
        spread = summary['spread'][task]
        sooner = against.get('reached', {}).get(task) if row == 'start' else None
        lines.append([
            f'{name}: {task} {TASKS[task].make.main_score}', _ROWS[row], summary['seeds'],
            ', '.join(f'{score:.3f} ({step})' for step, score in curve[:-1]),
            f'{summary["mean"][task]:.3f}' + ('' if spread is None else f' ({spread:.3f})'),
            sooner or ''])
  return markdown(['score', 'initialised', 'seeds', 'score (step)', 'final score',
                   'step that reaches the other'], lines)


def _folder(workdir, name, row, seed):
  return os.path.join(workdir, name, row, f'seed_{seed}')


def _summaries(workdir, bases, seeds):
  found = {}
  for name, base in bases.items():
    scores = {task: score for task in base.mixer.tasks if (score := TASKS[task].make.main_score)}
    for row in _ROWS:
      outcomes = [outcome for seed in range(seeds) if (
          outcome := read_outcome(_folder(workdir, name, row, seed), scores))]
      if outcomes:
        found.setdefault(name, {})[row] = summarise(outcomes)
  return found


def _bases(options):
  """The configs to train twice, by name."""
  bases = {}
  for name in options.then.split(','):
    base = read_config(name)
    short = os.path.splitext(os.path.basename(name))[0]
    base.update_from_flattened_dict(_CHANGES.get(short, {}))
    if not SOURCES[base.data.source].facts.get('embedded'):
      if not options.root:
        print(f'{short}: left out, its data needs --root')
        continue
      base.data.root = options.root
    bases[short] = base
  return bases


def _run(options):
  check_positive(options, 'seeds', 'steps', 'first_steps')
  first, bases = _shortened(read_config(options.first), options.first_steps), _bases(options)
  workdir = paths.local(options.workdir, '--workdir')

  from xmodal.main import give_threads, use_two_cores
  from xmodal.train.process.compilation_cache import enable_compilation_cache
  use_two_cores(first)
  give_threads()
  enable_compilation_cache()

  start = os.path.join(workdir, 'first')
  if not train(first, start):
    return _stopped()
  for seed in range(options.seeds):
    for name, base in bases.items():
      for row, config in pair(base, start, options.steps).items():
        config.seed = seed
        if not train(config, _folder(workdir, name, row, seed)):
          return _stopped()
        found = _summaries(workdir, bases, options.seeds)
        write_table(workdir, 'table.md', table(found), **found)
  print(f'\n{table(_summaries(workdir, bases, options.seeds))}\n\nMean over the seeds (maximum '
        f'minus minimum). In {workdir}: results.json, and a folder per run')


def _stopped():
  print('stopped; the same command goes on')
  return stop.EXIT_CODE


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/bench_start_from')
  parser.add_argument('--first', default='vqa', help='config of the earlier run')
  parser.add_argument('--then', default='detection,vqa_rad', help='later configs, comma-separated')
  parser.add_argument('--root', default='', help='data folder, for configs that need one')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, help='steps of later runs; default: config')
  parser.add_argument('--first-steps', type=int, help='steps of the first run; default: config')
  return run_command(_run, parser.parse_args(arguments))


if __name__ == '__main__':
  heap.keep_memory()
  sys.exit(main())
