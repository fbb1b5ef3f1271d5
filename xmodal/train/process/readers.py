"""Processes that make the batches of a run, as config.data.workers says."""

from collections.abc import Callable, Iterator
import contextlib

import jax

from xmodal.data import pipeline
from xmodal.data.workers import Workers
from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan


@contextlib.contextmanager
def readers(plan: Plan, say: Callable[[str], None]) -> Iterator[None]:
  """Context manager: processes make the batches of training and of all evaluations.

  Args:
    plan: the plan of the run.
    say: called with a line when a process has died.

  Raises:
    UserError: a source or task cannot be sent to another process.
  """
  count = plan.config.data.workers
  if count is None:  # on a CPU they would take the cores of the model
    count = 0 if jax.default_backend() == 'cpu' else max(pipeline.cores() - 2, 1)
  if not count:
    yield
    return
  sizes = [(plan.maker('train', feed), plan.config.train.batch_size) for feed in plan.feeds]
  sizes += [(one.maker(feed), one.batch_size) for one in plan.evaluations.values()
            for feed in one.feeds]
  makers = {make.name: make for make, _ in sizes}
  rows = {make.name: len(meshes.local_rows(plan.mesh, size)) for make, size in sizes}
  parts = (plan, *plan.evaluations.values())
  with contextlib.closing(Workers(makers, rows, count, say)) as started:
    for part in parts:
      part.readers = started
    try:
      yield
    finally:
      for part in parts:
        part.readers = None
