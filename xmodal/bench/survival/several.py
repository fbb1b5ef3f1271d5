"""Cases of several processes: signals, deaths, a cut shard, a workdir that is not shared."""

import os
import pathlib
import signal
import subprocess

from xmodal.bench.survival.bench import STOPPED, Bench, Row, brief, check_ended, steps_lost
from xmodal.bench.survival.launch import FOUR, TWO, Broken, Launch

_SOON = 30.0  # seconds within which the others have to notice a death
_SHARED = 60.0  # seconds within which all have to end


def sigterm_4(bench: Bench) -> Row:
  """SIGTERM to all of four processes in training, as a scheduler sends it."""
  return _signalled(bench, signal.SIGTERM, 'step 3/', range(4), 'all of 4 processes at step 3')


def ctrl_c_4(bench: Bench) -> Row:
  """Ctrl-C to one of four processes in an evaluation."""
  return _signalled(bench, signal.SIGINT, 'step 12/', [2], '1 of 4 processes in an evaluation')


def _signalled(bench, which, moment, numbers, what):
  workdir = bench.new()
  with Launch(workdir, FOUR) as run:
    run.printed(moment)
    sent = max(run.send(number, which) for number in numbers)
    end = check_ended(run, STOPPED, 'stopped after step')
    seconds = max(run.ended) - sent
    if steps_lost(run):
      raise Broken(f'{steps_lost(run)} steps lost')
  return Row(f'{which.name} to {what}', end, bench.finish(workdir, FOUR), '0', f'{seconds:.1f}')


def peer_dies(bench: Bench) -> Row:
  """SIGKILL to the last of two processes."""
  return _dies(bench, 1, [0], 'SIGKILL to process 1 of 2')


def peer_is_silent(bench: Bench) -> Row:
  """SIGSTOP to the last of two processes, as of a machine that hangs: no connection closes."""
  return _dies(bench, 1, [0], 'SIGSTOP to process 1 of 2 (a machine that hangs)', signal.SIGSTOP)


def coordinator_dies(bench: Bench) -> Row:
  """SIGKILL to process 0 of two."""
  return _dies(bench, 0, [1], 'SIGKILL to process 0 of 2 (the coordinator)')


def coordinator_is_silent(bench: Bench) -> Row:
  """SIGSTOP to process 0 of two, likewise."""
  return _dies(bench, 0, [1], 'SIGSTOP to process 0 of 2', signal.SIGSTOP)


def _dies(bench, number, others, what, which=signal.SIGKILL):
  workdir = bench.new()
  with Launch(workdir, TWO) as run:
    run.printed('step 5/')
    died = run.send(number, which)
    if which == signal.SIGSTOP:
      run.until(lambda: all(run.ended[other] for other in others))
      run.send(number, signal.SIGKILL)
    end = check_ended(run, STOPPED, 'run the same command again to resume', others)
    noticed, lost = max(run.ended[other] for other in others) - died, steps_lost(run)
  if noticed > _SOON:
    raise Broken(f'noticed after {noticed:.0f} s, wanted {_SOON:.0f}')
  return Row(what, end, bench.finish(workdir, TWO), f'{lost}', f'{noticed:.1f}')


def cut_shard(bench: Bench) -> Row:
  """The arrays of the last checkpoint are cut short; two processes resume from the one before."""
  workdir = bench.half(TWO)
  checkpoints = pathlib.Path(workdir, 'checkpoints')
  before, newest = sorted(int(path.name) for path in checkpoints.iterdir())[-2:]
  shard = max((checkpoints / f'{newest}' / 'model' / 'd').iterdir(),
              key=lambda path: path.stat().st_size)
  os.truncate(shard, shard.stat().st_size // 2)
  with Launch(workdir, TWO) as run:
    check_ended(run, 0, 'in ')
    if run.resumed_from() != before or f'{newest} is damaged' not in run.text():
      raise Broken(f'resumed from {run.resumed_from()}, wanted {before}')
  said = next(line for line in run.text().splitlines() if 'is damaged' in line)
  return Row('a shard of the last checkpoint cut in half, resumed by 2 processes',
             f'0: {brief(said, workdir)}', bench.same(workdir, TWO), f'{newest - before}')


def other_workdirs(bench: Bench) -> Row:
  """Two processes with different --workdir."""
  return _apart([bench.new(), bench.new()], [], 'each of 2 processes with another --workdir')


def not_shared(bench: Bench) -> Row:
  """Two processes with one --workdir, where the second sees a folder of its own, as without NFS.

  Root mounts one there; others have no such way.
  """
  workdir, other = bench.new(), bench.new()
  os.makedirs(workdir)
  os.makedirs(other)
  mount = ['unshare', '-m', 'sh', '-c', 'mount --bind "$0" "$1" && shift && exec "$@"', other,
           workdir]
  if subprocess.run([*mount, 'true'], capture_output=True, check=False).returncode:
    raise Broken('not run: only root can mount a folder for one process')
  row = _apart([workdir, workdir], mount, '2 processes, one --workdir, different folders there')
  if os.listdir(workdir) + os.listdir(other):
    raise Broken(f'left {os.listdir(workdir) + os.listdir(other)} behind')
  return row


def _apart(workdirs, prefix, what):
  with Launch(workdirs, TWO, prefix=prefix) as run:
    end = check_ended(run, 2, 'workdir', [0, 1])
  if run.last_line(0) != run.last_line(1):
    raise Broken(f'two lines: {run.last_line(0)}, {run.last_line(1)}')
  if max(run.ended) - run.began > _SHARED:
    raise Broken(f'ended after {max(run.ended) - run.began:.0f} s, wanted {_SHARED:.0f}')
  return Row(what, end, 'nothing trained', '0', f'{max(run.ended) - run.began:.1f}')
