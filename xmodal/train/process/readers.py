"""Processes that make the batches of a run, as config.data.workers says."""

from collections.abc import Callable, Iterator
import contextlib

import jax

from xmodal.data import pipeline
from xmodal.data.workers import Workers
from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan


@contextlib.contextmanager
def readers(plan: Plan, say: Callable[[str], None], trains: bool = True) -> Iterator[None]:
  """Context manager: processes make the batches of training and of all evaluations.

  Args:
    plan: the plan of the run.
    say: called with a line when a process has died.
    trains: if false, only those of the default evaluation.

  Raises:
    UserError: a source or task cannot be sent to another process.
  """
  count = plan.config.data.workers
  if count is None:  # on a CPU they would take the cores of the model
    count = 0 if jax.default_backend() == 'cpu' else max(pipeline.cores() - 2, 1)
  if not count:
    yield
    return
  evaluations = list(plan.evaluations.values()) if trains else [plan.evaluation]

  def rows(batch_size):
    return len(meshes.local_rows(plan.mesh, batch_size))

  # A step reads a batch of each feed, an evaluation one of a single feed.
  largest = [[(plan.maker('train', feed), rows(plan.config.train.batch_size))
              for feed in plan.feeds]] if trains else []
  largest += [[(one.maker(feed), rows(one.batch_size))]
              for one in evaluations for feed in one.feeds]
  parts = (plan, *evaluations)
  with contextlib.closing(Workers(largest, count, say)) as started:
    for part in parts:
      part.readers = started
    try:
      yield
    finally:
      for part in parts:
        part.readers = None
