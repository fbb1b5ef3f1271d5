"""What a trained model loses and gains when it is made smaller: rounded, pruned, distilled.

`xmodal bench compress --checkpoint runs/vqa --workdir runs/small [--keep 0.75,0.5] ...`
scores a run on its validation split with its weights in each precision; prunes it to each share of
its parameters, and fine-tunes the rest with the run as teacher; and trains models of half the width
from nothing, with and without the teacher. Milliseconds are from a picture in memory to the answer,
of 1 and of 32 pictures, in alternating rounds; memory is that of the program for 32, with weights,
by the compiler.

`xmodal bench compress --size small --workdir DIR` measures size and speed of an untrained model.

Repeating the command skips what is finished and resumes what was stopped. The table is table.md,
and all numbers are results.json, both in --workdir.
"""

import argparse
from collections.abc import Mapping
import os
import statistics
import sys
import tempfile

import jax
import numpy as np

from xmodal import config as configs
from xmodal import heap, paths, prune
from xmodal.bench.harness import check_positive, measure, run_command
from xmodal.bench.multitask import train, write_table
from xmodal.bench.predict import QUESTIONS, make_checkpoint
from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.models.quantized import ROUNDINGS
from xmodal.predictor import AT_ONCE, PRECISIONS, Predictor
from xmodal.tasks.task import TASKS
from xmodal.train.checkpoints import checkpoint
from xmodal.train.plan import Plan
from xmodal.train.process import stop
from xmodal.train.process.compilation_cache import enable_compilation_cache
from xmodal.train.start.earlier import open_earlier

_NARROW = ('hidden_dim', 'mlp_dim', 'num_heads')
_BATCHES = (1, AT_ONCE)
_MEMORY = ('argument', 'temp', 'output')  # kinds of memory that XLA states


def score(workdir: str, precision: str) -> dict[str, float]:
  """The main score of each task on the validation split."""
  step = checkpoint.find(workdir)
  config = configs.load(os.path.join(step, checkpoint.ASSETS, 'config.json'))
  config.train.samples = 0
  config.model.quantize = precision if precision in ROUNDINGS else ''
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1
  plan = Plan(config, os.path.dirname(os.path.dirname(step)), 'eval')
  variables = checkpoint.load_variables(step, plan.abstract_variables,
                                        ema=config.train.ema_decay > 0)
  if precision == 'bfloat16':
    variables = jax.tree.map(lambda x: x.astype('bfloat16') if x.dtype == np.float32 else x,
                             variables)
  with tempfile.TemporaryDirectory() as folder:
    found = plan.evaluation.run(variables, int(os.path.basename(step)), folder)
  return {name: of_task[TASKS[name].make.main_score] for name, of_task in found.items()
          if TASKS[name].make.main_score in of_task}


class Timed:
  """A loaded model with its speed and size.

  Attributes:
    numbers: 'parameters', 'megabytes' of the weights, and 'program_megabytes': those and what the
      program for AT_ONCE pictures needs beside.
  """

  def __init__(self, workdir: str, precision: str):
    """Loads a run, and compiles its first task for each of _BATCHES."""
    self._predictor = Predictor(workdir, precision=precision)
    size, rng = self._predictor.config.data.image_size, np.random.default_rng(0)
    first = next(iter(self._predictor.tasks.values()))
    text = QUESTIONS.get(first.name, ('a red circle',))[0]
    queries = [first.query(None if first.draws else picture, text)
               for picture in rng.integers(0, 256, (AT_ONCE, size, size, 3), np.uint8)]
    task, self._examples = queries[0][0], [example for _, some in queries for example in some]
    leaves = jax.tree.leaves(self._predictor.variables)
    memory = self._predictor.program(task).lower(
        self._predictor.variables, self._predictor.batch(self._examples, {task.name: task})
    ).compile().memory_analysis()
    self.numbers = {'parameters': parameters(workdir),
                    'megabytes': sum(x.nbytes for x in leaves) / 1e6,
                    'program_megabytes': sum(getattr(memory, f'{kind}_size_in_bytes', 0)
                                             for kind in _MEMORY) / 1e6}
    self._task = task

  def answers(self, count: int):
    """A function that answers questions about `count` pictures; see harness.measure."""
    examples = self._examples[:count]
    return lambda: self._predictor(examples, self._task)


def untrained(size: str, folder: str) -> str:
  """A run that was not trained, of a size, for questions about pictures of 224 pixels."""
  config = configs.base()
  config.model.size, config.data.image_size = size, 224
  config.data.train_examples, config.data.eval_examples = 64, 8
  return folder if os.path.isdir(folder) else make_checkpoint(folder, config)


def parameters(workdir: str) -> int:
  """Number of a run's parameters."""
  predictor = Predictor(workdir, precision='float32')
  return sum(x.size for x in jax.tree.leaves(predictor.variables['params']))


def fine_tuned(base, teacher: str, start: str, steps: int, quantize: str = ''):
  """The config that trains what pruning left, or with rounding."""
  c = _shortened(base, steps)
  c.train.start_from, c.train.teacher, c.model.quantize = start, teacher, quantize
  for slot in parts.slots():
    for key, option in parts.slot_options(slot).items():
      c.model[slot][key] = option.default  # those of the pruned run
  return open_earlier(c.train).resolve(c)


def narrow(base, teacher: str, steps: int):
  """The config of a model of half the width, from nothing."""
  c = _shortened(base, steps)
  c.train.teacher = teacher
  for slot in parts.slots():
    if c.model[slot].get('pretrained'):
      continue
    for key, value in parts.fields(c.model, slot).items():
      if key in _NARROW:
        c.model[slot][key] = max(value // 2, 1)
  return c


def _shortened(base, steps):
  c = base.copy_and_resolve_references()
  c.train.steps = c.train.eval_every = c.train.checkpoint_every = steps
  c.train.samples, c.train.start_from, c.train.teacher = 0, '', ''
  c.optimizer.warmup_steps = min(c.optimizer.warmup_steps, steps // 10)
  return c


def table(rows: Mapping[str, Mapping]) -> str:
  """Formats {model: numbers} as Markdown; times and sizes with their ratio to the first."""
  (_, first), *_ = rows.items()
  tasks = list(first.get('scores', ()))
  head = ('model', 'parameters', 'weights, MB', 'program, MB', '1 picture, ms', '32 pictures, ms',
          *tasks)
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for name, row in rows.items():
    cells = [f'{row["parameters"] / 1e6:.3f} M'] + [
        f'{row[key]:.2f} ({row[key] / first[key]:.2f})' if row.get(key) else '-'
        for key in ('megabytes', 'program_megabytes', 'ms_1', f'ms_{AT_ONCE}')]
    cells += [f'{row["scores"][task]:.1%}' for task in tasks]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _run(options):
  check_positive(options, 'steps', 'rounds')
  folder = paths.local(options.workdir, '--workdir')
  if bool(options.size) == bool(options.checkpoint):
    raise UserError('wanted one of --checkpoint and --size')
  if options.size:
    run = untrained(options.size, os.path.join(folder, options.size))
  else:
    step = checkpoint.find(paths.resolved(options.checkpoint, '--checkpoint'))
    run = os.path.dirname(os.path.dirname(step))
  precisions = options.precisions.split(',')
  if unknown := set(precisions) - set(PRECISIONS):
    raise UserError(f'--precisions: {min(unknown)!r}: wanted some of {",".join(PRECISIONS)}')
  enable_compilation_cache()
  models = {name: (run, name) for name in precisions}
  if not options.size:
    base = configs.load(os.path.join(step, checkpoint.ASSETS, 'config.json'))
    try:
      models |= _made(base, run, folder, options)
    except KeyboardInterrupt:
      return stop.EXIT_CODE
  timed = {name: Timed(*model) for name, model in models.items()}
  rows = {name: dict(one.numbers) for name, one in timed.items()}
  if not options.size:
    for name, model in models.items():
      rows[name]['scores'] = score(*model)
  for count in _BATCHES:
    ways = {name: model.answers(count) for name, model in timed.items()}
    measure(ways, 1, 1)  # compiles
    for name, seconds in measure(ways, options.rounds, 1).items():
      rows[name][f'ms_{count}'] = statistics.median(seconds) * 1e3
  text = table(rows)
  write_table(folder, 'table.md', text, rows=rows)
  print(f'\n{text}')
  return 0


def _made(base, run, folder, options):
  """Prunes, fine-tunes and distils; returns {name: (workdir, precision)}."""
  os.makedirs(folder, exist_ok=True)
  found = {}
  for keep in filter(None, options.keep.split(',')):
    cut, tuned = (os.path.join(folder, f'{what}_{keep}') for what in ('cut', 'tuned'))
    if not os.path.isdir(os.path.join(cut, 'checkpoints')):
      if prune.main(['--checkpoint', run, '--output', cut, '--keep', keep]):
        print(f'no row for {keep} of the parameters: see the line above')
        continue
    if not train(fine_tuned(base, run, cut, options.steps), tuned):
      raise KeyboardInterrupt
    found[f'pruned to {keep}'] = cut, 'float32'
    found[f'pruned to {keep}, fine-tuned'] = tuned, 'float32'
    found[f'pruned to {keep}, fine-tuned, int8'] = tuned, 'int8'
  for precision in filter(None, options.rounded.split(',')):
    tuned = os.path.join(folder, f'rounded_{precision}')
    if not train(fine_tuned(base, run, run, options.steps, precision), tuned):
      raise KeyboardInterrupt
    found[f'{precision}, fine-tuned'] = tuned, precision
  if options.narrow:
    for name, teacher in (('alone', ''), ('taught', run)):
      workdir = os.path.join(folder, f'narrow_{name}')
      if not train(narrow(base, teacher, options.narrow), workdir):
        raise KeyboardInterrupt
      found[f'half the width, {name}'] = workdir, 'float32'
  return found


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench compress', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', metavar='RUN')
  parser.add_argument('--size', help='a value of config.model.size, in place of --checkpoint')
  parser.add_argument('--workdir', required=True, metavar='DIR')
  parser.add_argument('--precisions', default=','.join(PRECISIONS), help='comma-separated')
  parser.add_argument('--keep', default='0.75,0.5', help="shares of parameters; '': none")
  parser.add_argument('--rounded', default='int4', help='precisions to fine-tune in')
  parser.add_argument('--steps', type=int, default=1000, help='of fine-tuning')
  parser.add_argument('--narrow', type=int, default=0, metavar='STEPS',
                      help='of models of half the width; 0: none')
  parser.add_argument('--rounds', type=int, default=20)
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  heap.keep_memory()
  sys.exit(main())
