"""Compares the first losses of two source trees bit for bit, to show that training is unchanged.

    git worktree add ../before HEAD~1
    xmodal bench same_losses --before ../before

Runs each config with `python -m xmodal.main` in both trees, stops after --steps steps, and compares
all numbers in metrics.jsonl except speeds and metrics that only one of them logs.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time

from xmodal.bench.harness import check_positive, run_command
from xmodal.errors import UserError
from xmodal.train.logs import metrics, speed

_CONFIGS = ('vqa', 'detection', 'generation', 'multitask_shared')


def first_losses(tree: str, config: str, steps: int, workdir: str) -> list[dict]:
  """Metrics of the first steps of a config in a source tree, one dict per step.

  Raises:
    UserError: the run ended before it reached the steps.
  """
  never = 10**6
  command = [sys.executable, '-m', 'xmodal.main',
             '--config', os.path.join('configs', f'{config}.py'),
             '--workdir', workdir, '--config.train.log_every=1',
             f'--config.train.eval_every={never}', f'--config.train.checkpoint_every={never}']
  log = os.path.join(os.path.dirname(workdir), f'{os.path.basename(workdir)}.log')
  with open(log, 'w', encoding='utf-8') as output:
    run = subprocess.Popen(command, cwd=tree, stdout=output, stderr=subprocess.STDOUT)
    try:
      lines = []
      while len(lines) < steps:
        time.sleep(0.5)
        ended = run.poll() is not None
        lines = [line for line in metrics.read(os.path.join(workdir, 'metrics.jsonl'))[0]
                 if line['split'] == 'train' and line['step'] <= steps and 'loss' in line]
        if ended and len(lines) < steps:
          raise UserError(f'{" ".join(command)} in {tree} ended with code {run.returncode} after '
                          f'{len(lines)} steps; its output is in {log}')
    finally:
      if run.poll() is None:
        run.send_signal(signal.SIGTERM)
        run.wait()
  return [{key: value for key, value in line.items() if key not in speed.NAMES}
          for line in sorted(lines, key=lambda line: line['step'])]


def difference(before: list[dict], after: list[dict]) -> str:
  """The first difference of two runs, and the largest of their losses; '' if they are equal."""
  for a, b in zip(before, after):
    keys = [key for key in a if key in b and a[key] != b[key]]
    if not keys:
      continue
    most = max(abs(x['loss'] - y['loss']) / max(abs(x['loss']), 1e-9)
               for x, y in zip(before, after))
    return (f'first at step {a["step"]}: {keys[0]} {a[keys[0]]} before, {b[keys[0]]} '
            f'after; losses differ by {most:.1e} at most')
  return ''


def run(options) -> int:
  """Runs every config in both trees; the exit code is 1 if any differs."""
  check_positive(options, 'steps')
  different = 0
  with tempfile.TemporaryDirectory() as folder:
    for config in options.configs.split(','):
      before, after = (
          first_losses(tree, config, options.steps, os.path.join(folder, f'{config}_{name}'))
          for name, tree in (('before', options.before), ('after', options.after)))
      found = difference(before, after)
      print(f'{config}: {found or f"{options.steps} steps equal bit for bit"}', flush=True)
      different += bool(found)
  return int(different > 0)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (1: they differ; 2: a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench same_losses', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--before', required=True, metavar='DIR', help='source tree to compare with')
  parser.add_argument('--after', default='.', metavar='DIR', help='changed source tree')
  parser.add_argument('--configs', default=','.join(_CONFIGS), help='names of files in configs/')
  parser.add_argument('--steps', type=int, default=50)
  return run_command(run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
