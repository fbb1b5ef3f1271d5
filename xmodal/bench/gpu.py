"""Training speed on one GPU: MFU of three tasks at three sizes, and what changes it.

`xmodal bench gpu [--cases NAME ...] [--seconds 500]` measures the steps of CASES as
`xmodal bench mfu` does, each in a process of its own. A group of them traces and compiles side by
side; when all have compiled, they train one after the other, so that nothing disturbs a measured
step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from xmodal.bench import mfu
from xmodal.bench.harness import changed, check_positive, read_config, run_command
from xmodal.errors import UserError, did_you_mean

# Config and changes of each task, at sizes of published models.
VQA = ('vqa', "mixer.tasks=('vqa',)", 'mixer.weights=(1.0,)', 'data.image_size=224',
       'vqa.question_length=32', 'vqa.answer_length=8', 'optimizer.learning_rate=1e-4')
DETECTION = ('detection', 'model.vision.num_layers=None', 'model.cross.num_layers=None',
             'data.image_size=512', 'train.ema_decay=0.0', 'optimizer.learning_rate=1e-4')
GENERATION = ('generation', 'data.image_size=256', 'generation.caption_length=32',
              'optimizer.name=adamw', 'optimizer.learning_rate=1e-4', 'train.ema_decay=0.0',
              'model.text.num_layers=None',
              *(f'model.denoiser.{key}=None'
                for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')))


def _at(size, batch, *changes):
  return (f'model.size={size}', f'train.batch_size={batch}', *changes)


# By name: (config, changes...).
CASES = {
    'vqa base': (*VQA, *_at('base', 256)),
    'vqa large': (*VQA, *_at('large', 128)),
    'detection large': (*DETECTION, *_at('large', 32)),
    'generation large': (*GENERATION, *_at('large', 128)),
    'vqa large, remat none': (*VQA, *_at('large', 128, 'model.remat=none')),
    'vqa large, remat full': (*VQA, *_at('large', 128, 'model.remat=full')),
    'vqa large, xla attention': (*VQA, *_at('large', 128, 'model.attention=xla')),
    'vqa large, batch 256': (*VQA, *_at('large', 256)),
    'vqa xl': (*VQA, *_at('xl', 64)),
    'detection xl': (*DETECTION, *_at('xl', 16, 'data.image_size=504')),
    'generation xl': (*GENERATION, *_at('xl', 64)),
    'detection base': (*DETECTION, *_at('base', 64)),
    'generation base': (*GENERATION, *_at('base', 256)),
    'vqa base, remat none': (*VQA, *_at('base', 256, 'model.remat=none')),
    'detection large, remat none': (*DETECTION, *_at('large', 32, 'model.remat=none')),
    'generation large, remat none': (*GENERATION, *_at('large', 128, 'model.remat=none')),
}
SMALL = ('data.train_examples=512', 'data.eval_examples=16')
_GROUP = 4  # compile together: XLA takes several cores for each


def case_config(name: str):
  """The config of a case."""
  config, *changes = CASES[name]
  return changed(read_config(config), [*SMALL, *changes])


def _case(name, room, number, count, rounds, steps):
  """One process of a group: compile, wait for the others, train when those before have ended."""
  compiled = mfu.compiled(mfu.prepare(case_config(name)))
  open(os.path.join(room, f'ready{number}'), 'w', encoding='utf-8').close()
  while (sum(entry.startswith(('ready', 'gone')) for entry in os.listdir(room)) < count
         or any(not os.path.exists(os.path.join(room, f'gone{other}')) for other in range(number))):
    time.sleep(0.2)
  print(mfu.row(name, mfu.run(compiled, rounds, steps)), flush=True)


def _run(options):
  check_positive(options, 'rounds', 'steps', 'seconds')
  for name in options.cases:
    if name not in CASES:
      raise UserError(f'--cases: no case {name!r}{did_you_mean(name, CASES)}; wanted some of '
                      f'{", ".join(CASES)}')
  if options.case is not None:
    return _case(options.cases[options.case], options.room, options.case, len(options.cases),
                 options.rounds, options.steps)
  print(mfu.HEAD, flush=True)
  ends, failed = time.monotonic() + options.seconds, 0
  for first in range(0, len(options.cases), _GROUP):
    failed += _group(options.cases[first:first + _GROUP], options, ends)
  return int(failed > 0)


def _group(cases, options, ends):
  """Measures some cases; returns how many failed."""
  # JAX reserves most of the memory at its start otherwise, in the first process.
  environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
                              'XLA_PYTHON_CLIENT_MEM_FRACTION': '.93'}
  failed, processes = 0, []
  with tempfile.TemporaryDirectory() as room:
    for number in range(len(cases)):
      with open(os.path.join(room, f'log{number}'), 'w', encoding='utf-8') as log:
        processes.append(subprocess.Popen(
            [sys.executable, '-m', 'xmodal.bench.gpu', '--case', str(number), '--room', room,
             '--rounds', str(options.rounds), '--steps', str(options.steps), '--cases', *cases],
            env=environment, stdin=subprocess.DEVNULL, stderr=log))
    for number, process in enumerate(processes):
      try:
        code = process.wait(max(ends - time.monotonic(), 0.1))
      except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
      open(os.path.join(room, f'gone{number}'), 'w', encoding='utf-8').close()
      if code:
        failed += 1
        with open(os.path.join(room, f'log{number}'), encoding='utf-8') as f:
          print(f'{cases[number]}: no result (code {code}): {f.read()[-400:]}', flush=True)
  return failed


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (1: a case has no result; 2: a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench gpu', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', nargs='+', default=list(CASES), metavar='NAME')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=5, help='steps per round')
  parser.add_argument('--seconds', type=int, default=500, help='end after this time')
  parser.add_argument('--case', type=int, help=argparse.SUPPRESS)
  parser.add_argument('--room', help=argparse.SUPPRESS)
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
