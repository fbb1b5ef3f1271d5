"""Requests that arrive together become one batch: a queue with a deadline, and the one thread that
uses the model."""

import collections
from collections.abc import Callable
import concurrent.futures
import dataclasses
import logging
import threading
import time

from xmodal.errors import UserError
from xmodal.serve.engine import Engine, OnStep, Request

_LOG = logging.getLogger('xmodal.serve')


@dataclasses.dataclass(eq=False)
class _Job:
  task: str
  request: Request
  answer: concurrent.futures.Future
  on_step: OnStep | None


class Failed(Exception):
  """The model raised an error that is not the client's; the log has its traceback."""


class Batcher:
  """Answers requests in batches of one task, oldest first.

  Attributes:
    problem: why no program could be compiled; '': nothing is wrong.
  """

  def __init__(self, engine: Engine, *, wait_seconds: float, batching: bool = True,
               coming: Callable[[], bool] = lambda: False,
               on_batch: Callable[[str, int], None] = lambda task, rows: None):
    """A batcher whose thread starts with `start`.

    Args:
      engine: the model.
      wait_seconds: how long the first request of a batch waits at most while others are coming.
      batching: whether several requests may share a batch.
      coming: whether requests are on their way to the queue: received and not submitted.
      on_batch: called with the task and rows of each batch.
    """
    self._engine, self._wait, self._batching = engine, wait_seconds, batching
    self._coming, self._on_batch = coming, on_batch
    self._queue: collections.deque[_Job] = collections.deque()
    self._changed = threading.Condition()
    self._closed = False
    self.ready, self.problem = threading.Event(), ''
    self._thread = threading.Thread(target=self._run, name='model', daemon=True)

  def start(self) -> None:
    """Starts to compile, then to answer."""
    self._thread.start()

  def close(self, seconds: float | None = None) -> bool:
    """Answers what is queued, and ends the thread; whether it ended within the time."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    self._thread.join(seconds)
    return not self._thread.is_alive()

  def __len__(self) -> int:
    return len(self._queue)

  def submit(self, task: str, request: Request, on_step: OnStep | None = None
             ) -> concurrent.futures.Future:
    """Queues a request.

    Returns:
      A future of the answer as plain JSON values. It raises UserError if the request is wrong, and
      Failed if the model fails. If cancelled before its batch starts, the request is dropped.
    """
    job = _Job(task, request, concurrent.futures.Future(), on_step)
    with self._changed:
      self._queue.append(job)
      self._changed.notify_all()
    return job.answer

  def wake(self) -> None:
    """Makes the thread look again whether requests are coming."""
    with self._changed:
      self._changed.notify_all()

  def _run(self):
    try:
      for program in self._engine.programs():
        if self._closed:
          return
        program()
    except Exception as error:  # the server goes on, and says that it is not ready
      _LOG.exception('cannot compile')
      self.problem = f'{type(error).__name__} while compiling; see the log of the server'
      return
    self.ready.set()
    while batch := self._next_batch():
      self._answer(batch)

  def _next_batch(self) -> list[_Job]:
    """Waits for requests; [] once closed and all are answered."""
    with self._changed:
      while True:
        while not self._queue:
          if self._closed:
            return []
          self._changed.wait()
        task = self._queue[0].task
        if not self._alone(self._queue[0]):
          self._gather(task, time.monotonic() + self._wait)
        batch = self._take(task)
        if batch:  # else all were cancelled
          return batch

  def _gather(self, task, deadline):
    """Waits until a batch is full, no request is coming, or the deadline."""
    while (not self._closed and self._coming()
           and sum(job.request.rows for job in self._queue if job.task == task)
           < self._engine.most_rows):
      left = deadline - time.monotonic()
      if left <= 0 or not self._changed.wait(left):
        return

  def _alone(self, job):
    """Whether a job has its batch to itself."""
    return not self._batching or self._engine.tasks[job.task].draws or job.on_step is not None

  def _take(self, task):
    """Removes the jobs of the next batch from the queue; the others keep their order."""
    batch, others, rows = [], [], 0
    while self._queue:
      job = self._queue.popleft()
      fits = not batch or (not self._alone(job) and not self._alone(batch[0])
                           and rows + job.request.rows <= self._engine.most_rows)
      if job.task != task or not fits:
        others.append(job)
      elif job.answer.set_running_or_notify_cancel():
        batch.append(job)
        rows += job.request.rows
    self._queue.extend(others)
    return batch

  def _answer(self, batch):
    task, on_step = batch[0].task, batch[0].on_step
    self._on_batch(task, sum(job.request.rows for job in batch))
    try:
      answers = self._engine.answer(task, [job.request for job in batch], on_step)
    except Exception as error:  # one failing request must not end the server
      if len(batch) > 1:  # nor fail the others
        for job in batch:
          self._answer([job])
        return
      _LOG.exception('a request to %s failed', task)
      failed = error if isinstance(error, UserError) else Failed(type(error).__name__)
      answers = [failed] * len(batch)
    for job, answer in zip(batch, answers, strict=True):
      if isinstance(answer, Exception):
        job.answer.set_exception(answer)
      else:
        job.answer.set_result(answer)
