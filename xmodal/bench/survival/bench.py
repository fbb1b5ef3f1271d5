"""Undisturbed and half-finished runs, which the cases copy and disturb."""

import os
import random
import shutil
import signal
from typing import NamedTuple

from xmodal.bench.survival import outcome, small
from xmodal.bench.survival.launch import ONE, Broken, Launch, Mesh

STOPPED = 75
_HALF = 'step 9/'


class Row(NamedTuple):
  """A line of the table. noticed: seconds until the other processes ended; lost: steps."""

  done: str
  ended: str
  state: str
  lost: str = '-'
  noticed: str = '-'


class Bench:
  """The folder of all runs of the benchmark, and its random numbers."""

  def __init__(self, folder: str, seed: int, kills: int):
    self.folder, self.random, self.kills = folder, random.Random(seed), kills
    self._made, self._count, self._wall = {}, 0, 0.0

  def new(self, copy_of: str = '') -> str:
    """A workdir that does not exist, or a copy of one."""
    self._count += 1
    workdir = os.path.join(self.folder, f'run{self._count}')
    return shutil.copytree(copy_of, workdir) if copy_of else workdir

  def undisturbed(self, mesh: Mesh = ONE) -> str:
    """The workdir of a finished run that nothing disturbed."""
    if mesh not in self._made:
      self._made[mesh] = self.new()
      with Launch(self._made[mesh], mesh) as run:
        check_ended(run, 0, 'in ')
    return self._made[mesh]

  def wall(self) -> float:
    """Seconds that an undisturbed run takes once its programs are compiled and cached."""
    if not self._wall:
      self.undisturbed()
      workdir = self.new()
      with Launch(workdir) as run:
        check_ended(run, 0, 'in ')
        self._wall = run.seconds()
      outcome.compare(workdir, self.undisturbed(), same_mesh=True)  # nothing else would agree
    return self._wall

  def half(self, mesh: Mesh = ONE) -> str:
    """A copy of a run that SIGTERM stopped halfway."""
    if ('half', mesh) not in self._made:
      self._made['half', mesh] = workdir = self.new()
      with Launch(workdir, mesh) as run:
        run.printed(_HALF)
        run.send(0, signal.SIGTERM)
        check_ended(run, STOPPED, 'stopped after step')
    return self.new(copy_of=self._made['half', mesh])

  def finish(self, workdir: str, mesh: Mesh = ONE, other: bool = False, fault: str = '') -> str:
    """Resumes a run until it ends; returns how it agrees with the undisturbed one.

    Args:
      workdir: of the run.
      mesh: to resume on; the undisturbed run is of this mesh.
      other: whether the run began on another mesh.
      fault: see Launch.
    """
    steps = outcome.saved_steps(workdir)
    with Launch(workdir, mesh, fault) as run:
      check_ended(run, 0, 'in ')
      if run.resumed_from() != max(steps, default=0):
        raise Broken(f'resumed from step {run.resumed_from()}, and had {steps}')
    return self.same(workdir, mesh, other)

  def same(self, workdir: str, mesh: Mesh = ONE, other: bool = False) -> str:
    """How a finished run agrees with the undisturbed one; see finish."""
    return outcome.compare(workdir, self.undisturbed(mesh), same_mesh=not other)


def check_ended(run: Launch, code: int, line: str, processes=None) -> str:
  """Waits for a run; raises Broken unless processes end with this code, and with a last line
  that holds this text (process 0 alone where it is no error). Returns 'code: line'."""
  codes, numbers = run.wait(), list(processes or range(len(run.processes)))
  run.check_no_traceback()
  for number in numbers:
    if codes[number] != code:
      raise Broken(f'exit codes {codes}, wanted {code}: {run.last_line(number)[:150]}')
  for number in numbers if code == 2 or processes else numbers[:1]:
    if line not in run.last_line(number):
      raise Broken(f'last line of process {number}: {run.last_line(number)[:150]}')
  return f'{code}: {brief(run.last_line(numbers[0]), run.workdir)}'


def brief(line: str, workdir: str) -> str:
  """A line for the table."""
  return line.replace(os.path.dirname(workdir), 'DIR').replace('|', '/')[:240]


def steps_lost(run: Launch) -> int:
  """Steps that a killed start had made after its last complete checkpoint.

  Raises:
    Broken: more than those since the save before; a save may have been in progress.
  """
  lost = run.last_step() - max(outcome.saved_steps(run.workdir), default=0)
  if lost >= 2 * small.get_config().train.checkpoint_every + 1:
    raise Broken(f'{lost} steps lost')
  return max(lost, 0)
