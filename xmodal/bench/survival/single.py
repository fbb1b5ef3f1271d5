"""Cases of one process: kills, signals, disks, clocks, and other meshes."""

import os
import signal
import subprocess

from xmodal.bench.survival import outcome, small
from xmodal.bench.survival.bench import STOPPED, Bench, Row, brief, check_ended, steps_lost
from xmodal.bench.survival.launch import FOUR, ONE, TWO, Broken, Launch, Mesh

_MAY_END = (STOPPED, 130, 143)  # by a signal: saved, or nothing to save
_STEPS = small.get_config().train.steps
_MARGIN = 0.1  # seconds of a save within which it is killed


def kill(bench: Bench) -> Row:
  """SIGKILL at random moments; each third within a save."""
  workdir, wall, losses, in_saves, runs = bench.new(), bench.wall(), [], 0, 1
  while len(losses) < bench.kills:
    had = max(outcome.saved_steps(workdir), default=0)
    with Launch(workdir) as run:
      if in_save := len(losses) % 3 == 1:
        alive = run.until(lambda: run.last_step() > had and outcome.is_saving(workdir))
        alive = alive and run.waits(run.seconds() + bench.random.uniform(0, _MARGIN))
      else:
        # A resumed run has fewer steps left; half of the time is its start.
        alive = run.waits(bench.random.uniform(0, wall * (1 - had / (2 * _STEPS))))
      if not alive:
        check_ended(run, 0, 'in ')
        outcome.compare(workdir, bench.undisturbed(), same_mesh=True)
        workdir, runs = bench.new(), runs + 1
        continue
      run.send(0, signal.SIGKILL)
      run.wait()
      run.check_no_traceback()
      if run.last_step() and run.resumed_from() != had:
        raise Broken(f'resumed from step {run.resumed_from()}, and had {had}')
      losses.append(steps_lost(run))
      in_saves += in_save and outcome.is_saving(workdir)
  state = bench.finish(workdir)
  return Row(f'SIGKILL at {len(losses)} random moments of {runs} runs, {in_saves} within a save',
             '137', state, f'{max(losses)} at most')


def sigterm_1(bench: Bench) -> Row:
  """SIGTERM to one process: in training, in an evaluation, and at any moment."""
  return _signalled(bench, signal.SIGTERM)


def ctrl_c_1(bench: Bench) -> Row:
  """Ctrl-C likewise."""
  return _signalled(bench, signal.SIGINT)


def _signalled(bench, which):
  ends, line, workdir = [], '', bench.new()
  for moment in ('step 3/', 'evaluating', 'any'):
    with Launch(workdir) as run:
      if moment == 'evaluating':
        run.printed('step 12/')
      elif moment == 'any':
        run.waits(bench.random.uniform(0, bench.wall() / 2))  # a resumed run is shorter
      else:
        run.printed(moment)
      run.send(0, which)
      codes = run.wait()
      run.check_no_traceback()
      if codes[0] not in _MAY_END:
        raise Broken(f'exit code {codes[0]}: {run.last_line(0)[:150]}')
      if moment != 'any' and codes[0] != STOPPED:
        raise Broken(f'exit code {codes[0]} in {moment}, wanted {STOPPED}')
      if moment == 'evaluating' and run.last_step() != 12:
        raise Broken(f'stopped after step {run.last_step()}, wanted 12: not in its evaluation')
      if codes[0] == STOPPED and steps_lost(run):
        raise Broken(f'{steps_lost(run)} steps lost')
      ends.append(f'{codes[0]}')
      line = line or brief(run.last_line(0), workdir)
  return Row(f'{which.name} at step 3, in an evaluation, and at a random moment',
             f'{", ".join(ends)}: {line}', bench.finish(workdir), '0')


def full_disk(bench: Bench) -> Row:
  """A disk that is full after some checkpoints, then has room again."""
  folder = os.path.join(bench.folder, 'disk')
  os.makedirs(folder)
  size = 3 * 2**20
  mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder],
                               capture_output=True, check=False).returncode
  workdir = os.path.join(folder, 'run')
  try:
    with Launch(workdir, fault='' if mounted else 'small_files') as run:
      end = check_ended(run, 2, 'run the same command', [0])
      lost = steps_lost(run)
    if mounted:
      subprocess.run(['mount', '-o', f'remount,size={16 * size}', folder], check=True)
    state = bench.finish(workdir)
  finally:
    if mounted:
      subprocess.run(['umount', folder], check=False)
  how = 'a tmpfs of 3 MB, enlarged' if mounted else 'RLIMIT_FSIZE, removed'
  return Row(f'full disk ({how} before the resume)', end, state, f'{lost}')


def slow_disk(bench: Bench) -> Row:
  """Each fsync, rename and mkdir takes longer."""
  workdir = bench.new()
  return Row('each fsync, rename and mkdir takes 0.15 s longer', '0',
             bench.finish(workdir, fault='slow_disk'), '0')


def failing_disk(bench: Bench) -> Row:
  """EIO in checkpoints/ from some operation on."""
  workdir = bench.new()
  with Launch(workdir, fault='failing_disk') as run:
    end = check_ended(run, 2, 'checkpoint', [0])
    lost = steps_lost(run)
  return Row('EIO from the 61st operation in checkpoints/ on, mended before the resume', end,
             bench.finish(workdir), f'{lost}')


def clock_back(bench: Bench) -> Row:
  """The clock goes back by an hour before the resume, and once more in it."""
  workdir = bench.half()
  return Row('clock (time.time) set back by 1 h before the resume, and again 8 s later', '0',
             bench.finish(workdir, fault='clock_back'), '0')


def other_mesh(bench: Bench) -> Row:
  """Resumed with parameters sharded over two devices."""
  workdir = bench.half()
  return Row('stopped on 1 device, resumed with mesh.fsdp=2 on 2', '75, then 0',
             bench.finish(workdir, Mesh(1, 2, 2), other=True), '0')


def other_processes(bench: Bench) -> Row:
  """A run of two processes, resumed by one."""
  workdir = bench.half(TWO)
  return Row('stopped with 2 processes, resumed with 1', '75, then 0',
             bench.finish(workdir, ONE, other=True), '0')


def fewer_devices(bench: Bench) -> Row:
  """A run of four processes with a device each, resumed by two."""
  workdir = bench.half(FOUR)
  return Row('stopped on 4 devices of 4 processes, resumed on 2 of 2', '75, then 0',
             bench.finish(workdir, TWO, other=True), '0')
