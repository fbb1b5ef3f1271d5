"""Starts the processes of a run, and waits for what they print or write."""

from collections.abc import Callable, Sequence
import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from xmodal.bench.survival import small

_LIMIT = 400.0  # seconds after which a run counts as hung
_POLL = 0.004
_FAULTY = 'import sys; from xmodal.bench.survival import faulty; sys.exit(faulty.main())'
# What JAX and others print around a run's own lines.
_NOT_OURS = re.compile(r'^[WIEF]\d{4} |^\[Gloo\]|^\s*$')


class Broken(Exception):
  """A promise that does not hold, in one line."""


class Mesh(NamedTuple):
  """Processes of a run, devices of each process, and config.mesh.fsdp."""

  processes: int = 1
  devices: int = 1
  fsdp: int = 1

  def __str__(self):
    text = f'{self.processes} x {self.devices} devices'
    return f'{text}, fsdp={self.fsdp}' if self.fsdp > 1 else text


ONE, TWO, FOUR = Mesh(), Mesh(2), Mesh(4)


class Launch:
  """The processes of one start of a run; kills what is left of them at the end of `with`."""

  def __init__(self, workdirs: str | Sequence[str], mesh: Mesh = ONE, fault: str = '',
               prefix: Sequence[str] = ()):
    """Starts them.

    Args:
      workdirs: of all processes, or of each.
      mesh: see there.
      fault: a name in faulty.FAULTS; '': none.
      prefix: command that starts the program of the last process.
    """
    if isinstance(workdirs, str):
      workdirs = [workdirs] * mesh.processes
    program = ['-c', _FAULTY, fault] if fault else ['-m', 'xmodal', 'train']
    flags = [f'--config.mesh.fsdp={mesh.fsdp}']
    if mesh.processes > 1:
      with socket.create_server(('localhost', 0)) as free:
        address = f'localhost:{free.getsockname()[1]}'
      flags += [f'--coordinator={address}', f'--num_processes={mesh.processes}']
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(mesh.devices),
                   'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
    self.workdir, self.began = workdirs[0], time.monotonic()
    self.logs, self.processes, self.ended = [], [], [0.0] * mesh.processes
    for number, workdir in enumerate(workdirs):
      self.logs.append(f'{workdir}.{number}.log')
      own = [f'--process_id={number}'] if mesh.processes > 1 else []
      before = prefix if number == mesh.processes - 1 else ()
      with open(self.logs[-1], 'w', encoding='utf-8') as log:
        self.processes.append(subprocess.Popen(
            [*before, sys.executable, *program, '--config', small.__file__, '--workdir', workdir,
             *flags, *own], env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def seconds(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self.began

  def text(self, number: int = 0) -> str:
    """What a process has printed."""
    with open(self.logs[number], encoding='utf-8', errors='replace') as f:
      return f.read()

  def until(self, event: Callable[[], bool]) -> bool:
    """Waits for an event; False if all processes end before it."""
    while not event():
      if not self._running():
        return False
      if self.seconds() > _LIMIT:
        raise Broken(f'hung: {self.last_line(0)}')
      time.sleep(_POLL)
    return True

  def printed(self, text: str) -> bool:
    """Waits until process 0 prints a text; False if it ends before."""
    return self.until(lambda: text in self.text())

  def waits(self, moment: float) -> bool:
    """Waits until some seconds after the start; False if all processes end before."""
    return self.until(lambda: self.seconds() >= moment)

  def wait(self) -> list[int]:
    """Waits for all; returns their exit codes, as a shell shows them."""
    self.until(lambda: False)
    return self.codes()

  def codes(self) -> list[int]:
    """The exit codes of processes that have ended, as a shell shows them."""
    return [code if code >= 0 else 128 - code for code in (p.returncode for p in self.processes)]

  def send(self, number: int, which: signal.Signals) -> float:
    """Sends a signal to a process; returns the time."""
    self.processes[number].send_signal(which)
    return time.monotonic()

  def last_line(self, number: int) -> str:
    """The last line that a process printed, without those of libraries."""
    lines = [line for line in self.text(number).splitlines() if not _NOT_OURS.match(line)]
    return lines[-1].strip() if lines else ''

  def check_no_traceback(self) -> None:
    """Raises Broken if a process printed a traceback."""
    for number in range(len(self.processes)):
      if 'Traceback (most recent call last)' in self.text(number):
        raise Broken(f'process {number} printed a traceback: {self.last_line(number)}')

  def resumed_from(self) -> int:
    """The step at which this start began."""
    found = re.search(r'resuming from step (\d+)', self.text())
    return int(found[1]) if found else 0

  def last_step(self) -> int:
    """The last step printed; where it began if none."""
    steps = re.findall(r'^step (\d+)/', self.text(), re.MULTILINE)
    return int(steps[-1]) if steps else self.resumed_from()

  def _running(self):
    for number, process in enumerate(self.processes):
      if process.poll() is not None and not self.ended[number]:
        self.ended[number] = time.monotonic()
    return not all(self.ended)
