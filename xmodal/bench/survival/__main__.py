"""Whether a run survives kills, signals, lost peers and bad disks, as a table.

    xmodal bench survival
    xmodal bench survival --cases kill full_disk --kills 5

Trains a run of a few seconds undisturbed, once per mesh. Each case disturbs a copy of it and
resumes that until it ends, then compares parameters, optimizer state and metrics with the
undisturbed run: bit for bit on the same mesh, within rtol=1e-3 and atol=1e-4 on another. The exit
code is 1 if a case fails. Runs on the CPU. Compiled programs are in a temporary folder, or in
JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import os
import signal
import sys
import tempfile
import time

from xmodal.bench.harness import check_positive, run_command
from xmodal.bench.survival import several, single
from xmodal.bench.survival.bench import Bench
from xmodal.bench.survival.launch import Broken

CASES = {case.__name__: case for case in (
    single.kill, single.sigterm_1, single.ctrl_c_1, several.sigterm_4, several.ctrl_c_4,
    several.peer_dies, several.peer_is_silent, several.coordinator_dies,
    several.coordinator_is_silent, several.cut_shard, several.other_workdirs,
    several.not_shared, single.full_disk, single.slow_disk, single.failing_disk,
    single.clock_back, single.other_mesh, single.other_processes, single.fewer_devices)}


def run(options) -> int:
  """Runs the cases and prints a line for each; returns 1 if one fails."""
  check_positive(options, 'kills')
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)
  failed = 0
  print('| case | what was done | how it ended | s until all ended | steps lost | end state |\n'
        '|---|---|---|---|---|---|')
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(folder, 'compiled'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    bench = Bench(folder, options.seed, options.kills)
    for name in options.cases:
      began = time.monotonic()
      try:
        row = CASES[name](bench)
        cells = row.done, row.ended, row.noticed, row.lost, row.state
      except Broken as broken:
        failed += 1
        cells = CASES[name].__doc__.partition('\n')[0], str(broken), '', '', '**fails**'
      print('|', ' | '.join((f'`{name}`', *cells)), '|', flush=True)
      print(f'{name}: {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)
  return int(failed > 0)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (1: a case fails; 2: a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench survival', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='NAME',
                      help=', '.join(CASES))
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  return run_command(run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
