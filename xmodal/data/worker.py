"""Processes that make rows of batches. `workers.Workers` starts them.

A parent of them all imports what the makers need, receives the makers and forks: the processes
share its memory, so the files of a source are held once. Each makes the rows of its records,
writes them into memory that it shares with the trainer, and reports what it met.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import math
import mmap
from multiprocessing.connection import Connection
import os
import pickle
import signal
import struct
import sys
import traceback

import jax
import numpy as np

from xmodal.data.example import Example, Source
from xmodal.data.pictures.box_checks import BadBoxes
from xmodal.data.pipeline import BatchMaker
from xmodal.errors import UserError

_ALIGNED = 64  # bytes, a cache line
_LENGTH = struct.Struct('<I')


@dataclasses.dataclass(frozen=True)
class SharedLayout:
  """Where the arrays of a batch lie in a slot of the shared memory.

  Attributes:
    size: bytes.
  """

  _places: tuple
  _tree: jax.tree_util.PyTreeDef
  size: int

  @classmethod
  def of(cls, row, count: int) -> 'SharedLayout':
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


class Note:
  """What the first process does, in shared memory: it may die at any moment."""

  SIZE = 8192  # bytes

  def __init__(self, memory: memoryview):
    """memory: what is shared; its last bytes are for this."""
    self._memory = memory[-Note.SIZE:]

  def write(self, name: str, record: int, picture: str) -> None:
    """Notes the name of a maker, the number of a record and the name of its picture."""
    content = json.dumps([name, record, picture[:500]]).encode()
    self.clear()  # while the content is not whole
    self._memory[_LENGTH.size:_LENGTH.size + len(content)] = content
    _LENGTH.pack_into(self._memory, 0, len(content))

  def read(self) -> tuple[str, int, str] | None:
    """What was noted last."""
    length, = _LENGTH.unpack_from(self._memory)
    return tuple(json.loads(self._memory[_LENGTH.size:][:length].tobytes())) if length else None

  def clear(self) -> None:
    _LENGTH.pack_into(self._memory, 0, 0)


class _Without:
  """A source in which some records cannot be read."""

  def __init__(self, source: Source, reasons: Mapping[int, str]):
    self._source, self._reasons = source, reasons

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    if index in self._reasons:
      raise UserError(self._reasons[index])
    return self._source[index]


def owners(records: np.ndarray, count: int) -> np.ndarray:
  """The process of each row: that of its record, so that each keeps other decoded pictures, unless
  it has its share already.

  Args:
    records: int [B].
    count: number of processes.

  Returns:
    int [B]; each of 0..count-1 at most ceil(B / count) times.
  """
  owner, most = records % count, -(-len(records) // count)
  order = np.argsort(owner, kind='stable')
  counts = np.bincount(owner, minlength=count)
  place = np.arange(len(records)) - np.repeat(np.cumsum(counts) - counts, counts)
  above = order[place >= most]
  owner[above] = np.repeat(np.arange(count), np.maximum(most - counts, 0))[:len(above)]
  return owner


def _one_by_one(make, records, note):
  """Yields the number of each row, and notes before that which record may end this process."""
  for row, record in enumerate(np.maximum(records, 0).tolist()):
    note.write(make.name, record, '')
    with contextlib.suppress(UserError):
      note.write(make.name, record, make.source[record].file_name)
    yield np.array([row])
  note.clear()


def serve(memory: memoryview, number: int, count: int, link: Connection,
          makers: Mapping[str, BatchMaker]) -> None:
  """Makes the rows of process `number` of `count`, until the trainer closes the link.

  A message of the trainer is (number of the job, offset of its slot, [(name of the maker, tasks,
  records, positions)], whether this process makes all rows, one by one, {name of a maker: {record:
  why it is not read}}).
  """
  layouts, note = {}, Note(memory)
  while True:
    try:
      job, offset, parts, alone, left_out = link.recv()
    except (EOFError, OSError):
      return
    try:
      found = []
      for name, tasks, records, positions in parts:
        make = makers[name].portable(1).with_tasks(tasks)
        make = dataclasses.replace(make, bad_boxes=BadBoxes())
        key = name, tasks, len(records)
        if key not in layouts:
          layouts[key] = SharedLayout.of(make.shapes(), len(records))
        if name in left_out:
          make = dataclasses.replace(make, source=_Without(make.source, left_out[name]))
        own = np.flatnonzero(owners(records, count) == number)
        for rows in _one_by_one(make, records, note) if alone else [own] if len(own) else []:
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
