"""Batches made by processes, which do not hold the lock of the trainer's Python.

A batch is made in pieces by all processes, in shared memory. It depends on its records and
positions only, so it is the same for any number of processes, and for threads.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import mmap
import multiprocessing.connection
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading

import jax
import numpy as np

from xmodal.data.pipeline import BatchMaker, BatchRequest
from xmodal.data.worker import Note, SharedLayout
from xmodal.errors import UserError

_AHEAD = 3  # batches of a stream that are made at the same time
_STREAMS = 2  # that may be read at once: training goes on reading during an evaluation
_MOST_DEATHS = 3  # that no record explains, with fewer than _APART batches between them
_APART = 100
_SCRIPT = ('import sys; from xmodal.data import worker; '
           'sys.exit(worker.main(*map(int, sys.argv[1:3]), list(map(int, sys.argv[3:]))))')


class _Job:
  """A batch that is being made."""

  def __init__(self, message, makers, layouts):
    self.message, self.makers, self.layouts = message, makers, layouts
    self.missing: set[int] = set()  # processes that have not made their rows
    self.error = None


class Workers:
  """Processes for the batches of some makers; close them at the end.

  They share memory of _AHEAD * _STREAMS times the largest job, and hold the makers besides.
  """

  def __init__(self, largest: Iterable[Sequence[tuple[BatchMaker, int]]], count: int,
               say: Callable[[str], None]):
    """Starts the processes.

    Args:
      largest: the largest job of each kind: its makers, and the number of rows that each makes.
      count: number of processes.
      say: called with a line when a process has died.

    Raises:
      UserError: a maker cannot be sent to another process.
    """
    self._count, self._say = count, say
    largest = list(largest)
    self._pickled = _pickle({make.name: make for job in largest for make, _ in job}, count)
    self._layouts: dict[tuple, SharedLayout] = {}
    self._slot = max(sum(self._layout(make, rows).size for make, rows in job) for job in largest)
    self._file = (os.fdopen(os.memfd_create('xmodal-batches'), 'r+b')
                  if hasattr(os, 'memfd_create') else tempfile.TemporaryFile())
    size = self._slot * _AHEAD * _STREAMS + Note.SIZE
    self._file.truncate(size)
    self._memory = memoryview(mmap.mmap(self._file.fileno(), size))
    self._slots = queue.SimpleQueue()
    for number in range(_STREAMS):
      self._slots.put([(number * _AHEAD + i) * self._slot for i in range(_AHEAD)])
    self._changed = threading.Condition()  # guards all that follows
    self._jobs: dict[int, _Job] = {}
    self._next = self._deaths = self._made = 0  # made: batches since a process died
    # Jobs during which processes died twice: the first process makes their rows one by one.
    self._suspects: set[int] = set()
    self._note = Note(self._memory)
    self._left_out: dict[str, dict[int, str]] = {}  # records that end the process that reads them
    self._failure, self._is_closed = None, False
    self._start()
    threading.Thread(target=self._receive, daemon=True).start()

  def _start(self):
    pairs = [socket.socketpair() for _ in range(self._count)]
    theirs, memory = [there.fileno() for _, there in pairs], self._file.fileno()
    self._process = subprocess.Popen(
        [sys.executable, '-c', _SCRIPT, str(memory), str(len(self._memory)), *map(str, theirs)],
        stdin=subprocess.PIPE, pass_fds=(memory, *theirs),
        # They leave the accelerator to the trainer.
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1',
             'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
    for _, there in pairs:
      there.close()
    self._links = [multiprocessing.connection.Connection(here.detach()) for here, _ in pairs]
    threading.Thread(target=self._feed, args=(self._process.stdin,), daemon=True).start()

  def _feed(self, pipe):
    try:
      with pipe:
        pipe.write(self._pickled)
    except OSError:
      pass  # it has died, as the links tell

  def _layout(self, make, count):
    key = make.name, tuple(make.tasks), count
    if key not in self._layouts:
      self._layouts[key] = SharedLayout.of(make.shapes(), count)
    return self._layouts[key]

  def batches(self, jobs: Iterable[Sequence[BatchRequest]]) -> Iterator[list[dict]]:
    """Yields the batches of each job in order, computed ahead of time.

    At most two of these iterators can be open: a third waits until one ends.
    """
    jobs, slots, pending = iter(jobs), self._slots.get(), collections.deque()
    unused = list(slots)
    try:
      while True:
        while unused and (parts := next(jobs, None)) is not None:
          pending.append(self._submit(unused.pop(), parts))
        if not pending:
          return
        job = self._finish(pending.popleft())
        slot = offset = job.message[1]
        batches = []
        for layout in job.layouts:
          # Copied: the next batch is written to the same place.
          batches.append(jax.tree.map(np.array, layout.arrays(self._memory, offset)))
          offset += layout.size
        unused.append(slot)
        yield batches
    finally:
      for number in pending:  # the processes may still write to their slots
        with contextlib.suppress(Exception):  # nobody asks for these batches any more
          self._finish(number)
      self._slots.put(slots)

  def _submit(self, slot, parts):
    layouts = [self._layout(part.make, len(part.records)) for part in parts]
    message = [(part.make.name, tuple(part.make.tasks), part.records, part.positions)
               for part in parts]
    with self._changed:
      number = self._next
      self._next += 1
      job = self._jobs[number] = _Job(
          (number, slot, message), [part.make for part in parts], layouts)
      self._send(job)
    return number

  def _send(self, job):
    alone = bool(self._suspects)
    links = self._links[:1] if alone else self._links
    job.missing = set(range(len(links)))
    for link in links:
      with contextlib.suppress(OSError):  # of a process that has died: see _receive
        link.send((*job.message, alone, self._left_out))

  def _finish(self, number):
    """Waits for a job and removes it; raises what its processes raised."""
    with self._changed:
      job = self._jobs[number]
      self._changed.wait_for(lambda: self._failure or not job.missing)
      del self._jobs[number]
    if error := job.error or self._failure:
      raise error
    return job

  def _receive(self):
    """Takes what the processes send, in a thread of its own."""
    try:
      self._take_all()
    except Exception as error:  # whatever it is, nobody may wait for ever
      with self._changed:
        self._fail(error)

  def _take_all(self):
    while not self._is_closed:
      for link in multiprocessing.connection.wait(self._links):
        try:
          message = link.recv()
        except (EOFError, OSError):
          with self._changed:
            if not self._is_closed:
              self._restart()
              self._changed.notify_all()
          break  # the links are others now
        with self._changed:
          self._take(self._links.index(link), *message)
          self._changed.notify_all()
      if self._failure:
        return

  def _take(self, worker, number, met, error):
    job = self._jobs[number]
    job.missing.discard(worker)
    if not job.missing:
      self._made += 1
      self._suspects.discard(number)
    job.error = job.error or error
    for make, (pictures, boxes) in zip(job.makers, met or ()):
      make.bad_boxes.merge(boxes)
      for record, reason in pictures:
        try:
          make.bad.add(record, reason)
        except UserError as too_many:
          job.error = job.error or too_many

  def _restart(self):
    reason = _reason(self._end())
    died = f'a process that reads pictures died ({reason})'
    if self._made >= _APART:
      self._deaths = 0
    self._made = 0
    if self._suspects and (at := self._note.read()):
      name, record, picture = at
      self._left_out.setdefault(name, {})[record] = (
          f'{picture or f"record {record}"}: the process that read it died ({reason})')
      self._deaths = 0
    else:
      self._deaths += 1
    self._note.clear()
    if self._deaths > _MOST_DEATHS:
      self._fail(UserError(f'{died}, the {self._deaths}th time: lower config.data.workers='
                           f'{self._count}, or set it to 0 for threads'))
      return
    self._say(f'{died}: started again')
    self._start()
    unmade = {number: job for number, job in self._jobs.items() if job.missing}
    if self._deaths > 1:
      self._suspects = set(unmade)
    for job in unmade.values():
      self._send(job)

  def _fail(self, error):
    """Ends the wait for any batch with an error; the first one stays."""
    self._failure = self._failure or error
    self._changed.notify_all()

  def _end(self):
    """Ends all processes; returns the exit code of the first that died."""
    for link in self._links:
      link.close()
    try:
      return self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      return self._process.wait()

  def close(self) -> None:
    """Ends the processes. Batches that somebody still waits for end in a RuntimeError."""
    with self._changed:
      self._is_closed = True
      self._fail(RuntimeError('the processes that read pictures are closed'))
      # A closed link would not wake its reader.
      for link in self._links:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as end:
          end.shutdown(socket.SHUT_RDWR)
      self._end()
      self._file.close()


def _pickle(makers, count):
  try:
    return pickle.dumps({name: make.portable(count) for name, make in makers.items()})
  except Exception as error:  # whatever a part of a user's own holds
    raise UserError(f'config.data.workers={count}: a source or task cannot be sent to another '
                    f'process ({error}); set 0 for threads') from error


def _reason(code):
  if code == 137:
    return 'killed, perhaps as memory ran out'
  return f'signal {code - 128}' if code > 128 else f'exit code {code}'
