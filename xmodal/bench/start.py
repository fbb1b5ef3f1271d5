"""Seconds from the start of a training command to its first step.

`xmodal bench start [--config vqa] [--rounds 3] [KEY=VALUE ...]` starts the command, ends it at its
first logged step, and repeats that: the first start compiles, later ones find the compiled programs
in the cache. Processor seconds, of all cores, depend less on other load. For a large data set:
`xmodal bench data_size --workdir DIR`, then `data.source=pack data.root=DIR/pack`.
"""

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from xmodal.bench.harness import check_positive, run_command
from xmodal.errors import UserError


def start(command: list[str], cache: str) -> tuple[float, float]:
  """Runs a command until it logs step 1; returns its seconds and its processor seconds.

  Raises:
    UserError: it ended before.
  """
  began = time.perf_counter()
  spent = resource.getrusage(resource.RUSAGE_CHILDREN)
  run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env={**os.environ, 'XDG_CACHE_HOME': cache})
  last = ''
  for line in run.stdout:
    if line.startswith('step 1/'):
      break
    last = line.strip() or last
  else:
    raise UserError(f'{" ".join(command)} ended with code {run.wait()}: {last}')
  seconds = time.perf_counter() - began
  run.send_signal(signal.SIGKILL)
  run.communicate()
  now = resource.getrusage(resource.RUSAGE_CHILDREN)
  return seconds, now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime


def _run(options):
  check_positive(options, 'rounds')
  with tempfile.TemporaryDirectory() as folder:
    found = []
    for number in range(1 + options.rounds):
      found.append(start(
          [sys.executable, '-m', 'xmodal.main', '--config', options.config,
           '--workdir', os.path.join(folder, f'run{number}'), '--config.train.log_every=1',
           *(f'--config.{change.removeprefix("config.")}' for change in options.changes)],
          os.path.join(folder, 'cache')))
  warm = [statistics.median(values) for values in zip(*found[1:])]
  print('until step 1   seconds   of processors')
  for name, (seconds, spent) in (('cold', found[0]), ('warm', warm)):
    print(f'{name:12} {seconds:9.1f} {spent:15.1f}', flush=True)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench start', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='vqa')
  parser.add_argument('--rounds', type=int, default=3, help='starts with a warm cache')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
