"""Processes that make rows of batches. `workers.Workers` starts them.

A parent of them all imports what the makers need, receives the makers and forks: the processes
share its memory, so the files of a source are held once. Each makes the rows of its records,
writes them into memory that it shares with the trainer, and reports what it met.
"""

from collections.abc import Mapping
import dataclasses
import math
import mmap
from multiprocessing.connection import Connection
import os
import pickle
import signal
import sys
import traceback

import jax
import numpy as np

from xmodal.data.pictures.box_checks import BadBoxes
from xmodal.data.pipeline import BatchMaker

_ALIGNED = 64  # bytes, a cache line


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the arrays of a batch lie in a slot of the shared memory.

  Attributes:
    size: bytes.
  """

  _places: tuple
  _tree: jax.tree_util.PyTreeDef
  size: int

  @classmethod
  def of(cls, row, count: int) -> 'Layout':
    """The layout of `count` rows; row: a batch of one example."""
    leaves, tree = jax.tree.flatten(row)
    places, offset = [], 0
    for leaf in leaves:
      shape = (count, *leaf.shape[1:])
      places.append((offset, shape, leaf.dtype))
      offset += -(-math.prod(shape) * leaf.dtype.itemsize // _ALIGNED) * _ALIGNED
    return cls(tuple(places), tree, offset)

  def arrays(self, memory: memoryview, offset: int):
    """The batch at a place in memory, as arrays that share it."""
    return jax.tree.unflatten(self._tree, [
        np.ndarray(shape, dtype, memory, offset + start) for start, shape, dtype in self._places])


def serve(memory: memoryview, number: int, count: int, link: Connection,
          makers: Mapping[str, BatchMaker]) -> None:
  """Makes the rows whose record number leaves `number` on division by `count`, until the trainer
  closes the link.

  A record always comes to the same process, so that each keeps other decoded pictures.
  """
  layouts = {}
  while True:
    try:
      job, offset, parts = link.recv()
    except (EOFError, OSError):
      return
    try:
      found = []
      for name, tasks, records, positions in parts:
        make = makers[name].portable(1).with_tasks(tasks)
        make = dataclasses.replace(make, bad_boxes=BadBoxes())
        key = name, tasks, len(records)
        if key not in layouts:
          layouts[key] = Layout.of(make.shapes(), len(records))
        rows = np.flatnonzero(records % count == number)
        if len(rows):
          batch = make(records[rows], positions[rows])
          jax.tree.map(lambda whole, part, rows=rows: whole.__setitem__(rows, part),
                       layouts[key].arrays(memory, offset), batch)
        offset += layouts[key].size
        found.append((make.bad.pictures if make.bad else [], make.bad_boxes))
      answer = job, found, None
    except Exception as error:  # raised again by the trainer
      answer = job, None, _portable(error)
    try:
      link.send(answer)
    except OSError:
      return


def _portable(error):
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:  # an exception of any class, with anything in it
    return RuntimeError(''.join(traceback.format_exception(error)))
  return error


def main(memory: int, size: int, links: list[int]) -> int:
  """Forks a process for each link, and ends with the first that dies.

  Args:
    memory: descriptor of the shared memory; stdin brings the makers, pickled.
    size: bytes.
    links: descriptors of sockets, one for each process.
  """
  # The trainer ends these processes by closing the links.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  makers = pickle.load(sys.stdin.buffer)
  view = memoryview(mmap.mmap(memory, size))
  children = []
  for number, link in enumerate(links):
    child = os.fork()
    if not child:
      for other in links:
        if other != link:
          os.close(other)
      serve(view, number, len(links), Connection(link), makers)
      os._exit(0)
    children.append(child)
  for link in links:
    os.close(link)
  while children:
    child, status = os.wait()
    children.remove(child)
    if code := os.waitstatus_to_exitcode(status):
      for other in children:
        os.kill(other, signal.SIGKILL)
      return 128 - code if code < 0 else code
  return 0
