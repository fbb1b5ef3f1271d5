"""Makes batches of arrays from a source, in a reproducible order."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import threading
from typing import Any, NamedTuple

import jax
import numpy as np

from xmodal import storage
from xmodal.data import order
from xmodal.data.example import Example, Source
from xmodal.data.made import Concatenated
from xmodal.data.pictures import images
from xmodal.data.pictures.augmentation import Augmentation, Transform
from xmodal.data.pictures.box_checks import BadBoxes, keep_inside
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.pictures.placement import Placement
from xmodal.errors import UserError

_MOST_THREADS = 16  # each makes one batch and holds it in memory


class BadPictures:
  """Counts pictures that cannot be read, and stops a run that has too many.

  Attributes:
    reasons: record number -> why its picture cannot be read.
  """

  def __init__(self, num_records: int, max_share: float,
               count: Callable[[int], int] | None = None):
    """Tolerates up to max_share (0..1) of num_records distinct records.

    Args:
      num_records, max_share: see above.
      count: counts a record across all processes of a run, and returns their total. None: this
        process reads all records.
    """
    self._allowed = max_share * num_records
    self._num_records, self._max_share, self._count = num_records, max_share, count
    self._lock = threading.Lock()
    self._met: set[int] = set()
    self.reasons: dict[int, str] = {}

  def lines(self) -> list[str]:
    """A line on each unreadable picture, once even if several records share it."""
    return sorted(set(self.reasons.values()))

  def add(self, record: int, reason: str) -> None:
    """Notes a record; raises UserError once there are more than the share allowed."""
    with self._lock:
      self.reasons[record] = reason
      self._met.add(record)
      met = self._count(record) if self._count else len(self._met)
      if met > self._allowed:
        raise UserError(
            f'{met} of {self._num_records} pictures cannot be read, more than the '
            f'{self._max_share:.1%} allowed; the last: {reason}; repair them (python -m '
            'xmodal check lists all) or raise config.data.max_bad_share')


class _Unread:
  """BadPictures of another process, which lists them for the one that counts."""

  def __init__(self):
    self.pictures: list[tuple[int, str]] = []

  def add(self, record, reason):
    self.pictures.append((record, reason))


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """Turns record numbers into one batch of arrays.

  Attributes:
    source: source of the Examples.
    tasks: task name -> object with encode(example, placement) -> dict of arrays.
    image_size: (height, width) in pixels of the model's input.
    bad: counter of unreadable pictures; None: the first one raises UserError.
    augmentation: None for evaluation.
    blank: 'image' or 'question': the input to hide from the model (for baselines).
    seed: seed of the augmentation.
    decode: images.decode, or a version with a cache.
    keep_aspect: if true, the picture keeps its aspect ratio and lies at the top left; the rest is
      black padding. Otherwise it is stretched to the input.
    bad_boxes: collects boxes that are not inside their pictures. They are clipped to the picture,
      and removed if nothing of them is inside.
    senses: name of a sense beside pictures and text -> function that encodes an example for it.
    name: unique in a run.
    workers: processes that know this maker by its name; None: threads make its batches.
    root: where the source is; of a bucket, many examples are read at the same time.
  """

  source: Source
  tasks: dict
  image_size: tuple[int, int]
  bad: BadPictures | None
  augmentation: Augmentation | None = None
  blank: str = ''
  seed: int = 0
  decode: Callable[..., images.Decoded] = images.decode
  keep_aspect: bool = False
  bad_boxes: BadBoxes = dataclasses.field(default_factory=BadBoxes)
  senses: Mapping[str, Callable[[Example], dict]] = dataclasses.field(default_factory=dict)
  name: str = ''
  workers: Any = None  # a data.workers.Workers
  root: str = ''

  def with_tasks(self, names: Iterable[str]) -> 'BatchMaker':
    """The maker with some of its tasks."""
    return dataclasses.replace(self, tasks={name: self.tasks[name] for name in names})

  def shapes(self) -> dict:
    """A batch of one padding example."""
    return self(np.array([-1]), np.array([0]))

  def portable(self, count: int) -> 'BatchMaker':
    """The maker for each of `count` other processes, which count no unreadable pictures."""
    decode = self.decode.part(count) if isinstance(self.decode, KeepDecoded) else self.decode
    return dataclasses.replace(self, workers=None, decode=decode, bad=self.bad and _Unread())

  def __call__(self, records: np.ndarray, positions: np.ndarray) -> dict:
    """One batch.

    Args:
      records: int [B], record numbers; -1 for a filler, which is not valid.
      positions: int [B], positions in the training stream: the augmentation of an
        example depends on (seed, position) only.

    Returns:
      {'image': uint8 [B, H, W, 3], 'valid': bool [B], name of another sense: its arrays [B, ...],
      task name: {feature: [B, ...]}}.
      Unreadable pictures are black and have valid False. With keep_aspect also 'extent':
      int32 [B, 2], the (height, width) in pixels of the part that is not padding, which
      starts at the top left corner.
    """
    pixels = np.zeros((len(records), *self.image_size, 3), np.uint8)
    rows = list(storage.each(self.root, lambda row: self._row(*row),
                             zip(records.tolist(), positions.tolist(), pixels)))
    return {'image': pixels, **jax.tree.map(lambda *leaves: np.stack(leaves), *rows)}

  def _row(self, record, position, out):
    """An example's features; its picture is written to out, uint8 [H, W, 3]."""
    try:
      example = self.source[max(record, 0)]
    except UserError as error:  # a record that has changed on disk: as a picture that has
      self._count_bad(record, error)
      example, record = Example(np.zeros((1, 1, 3), np.uint8)), -1
    if self.blank == 'question':
      example = dataclasses.replace(example, question='')
    placement, extent = self._picture(example, record, position, out)
    readable = placement is not None
    if readable:
      if record >= 0 and example.recorded_size:
        self.bad_boxes.add_size(example, placement.width, placement.height)
      example, complaints = keep_inside(example, placement.width, placement.height)
      if complaints and record >= 0:
        self.bad_boxes.add(record, example, complaints)
    else:
      placement = Placement(self.image_size[1], self.image_size[0])
    valid = readable and record >= 0
    if not valid:  # no annotations, also for tasks that compare the examples of a batch
      example = Example(example.image)
    if self.blank == 'image':
      out[:], extent = 0, self.image_size  # the extent would reveal the picture's shape
    row = {'valid': np.bool_(valid)}
    if self.keep_aspect:
      row['extent'] = np.array(extent, np.int32)
    for name, encode in self.senses.items():
      row[name] = encode(example)
    for name, task in self.tasks.items():
      row[name] = task.encode(example, placement)
    return row

  def _count_bad(self, record, error):
    # Without its bucket a run would learn from empty pictures.
    if self.bad is None or isinstance(error, storage.Unreachable | storage.AccessRefused):
      raise error
    if record >= 0:
      self.bad.add(record, str(error))

  def _picture(self, example, record, position, out):
    """Writes an example's picture to out; returns its Placement (None: unreadable) and extent."""
    transform = Transform()
    if self.augmentation is not None:
      rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
      transform = self.augmentation.draw(example, rng)
    try:
      picture = self.decode(example.image, self._decoded_size)
    except UserError as error:
      self._count_bad(record, error)
      return None, self.image_size
    return transform.apply(picture, out, self.keep_aspect)

  @functools.cached_property
  def _decoded_size(self):
    """(height, width) to decode to, the same for every transform so that pictures can be cached."""
    left = 1 - (self.augmentation.crop if self.augmentation else 0)  # share that a crop keeps
    return tuple(math.ceil(side / left) for side in self.image_size)


def train_records(make: BatchMaker, batch_size: int, number: int,
                  rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
  """(records, positions) of this host's rows (None: all) of the number-th batch of a stream."""
  positions = order.positions(number, batch_size, rows)
  return order.train_records(positions, len(make.source), make.seed), positions


class BatchRequest(NamedTuple):
  """A batch to be made; arguments as of BatchMaker."""

  make: BatchMaker
  records: np.ndarray
  positions: np.ndarray


def train_batches(make: BatchMaker, batch_size: int, start: int, stop: int,
                  rows: np.ndarray | None = None) -> Iterator[dict]:
  """This host's rows (None: all) of the batches start..stop-1, computed ahead of time.

  A batch depends on (make, batch_size, its number) only; a later start costs nothing.
  """
  return _single(BatchRequest(make, *train_records(make, batch_size, number, rows))
                 for number in range(start, stop))


def eval_batches(make: BatchMaker, batch_size: int, rows: np.ndarray | None = None,
                 most: int = 0) -> Iterator[dict]:
  """This host's rows (None: all) of batches that hold every record once, in order, then fillers.

  With `most` above 0, only the first `most` records.
  """
  size = min(len(make.source), most or len(make.source))

  def part(step):
    records = order.positions(step, batch_size, rows)
    return BatchRequest(make, np.where(records < size, records, -1), records)

  return _single(map(part, range(-(-size // batch_size))))


def _single(parts):
  return (batch for batch, in ahead([part] for part in parts))


def ahead(jobs: Iterable[Sequence[BatchRequest]]) -> Iterator[list[dict]]:
  """Yields the batches of each job in order, computed ahead of time: by the workers of the parts'
  makers, or else by threads."""
  jobs = iter(jobs)
  if (first := next(jobs, None)) is None:
    return iter(())
  jobs = itertools.chain([first], jobs)
  if first[0].make.workers is not None:
    return first[0].make.workers.batches(jobs)
  return threaded(lambda job: [part.make(part.records, part.positions) for part in job], jobs,
                  min(cores(), _MOST_THREADS))


def cores() -> int:
  """The CPUs that this process may use: a cluster may assign part of a machine."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def threaded(function: Callable, items: Iterable, threads: int | None = None) -> Iterator:
  """Yields function(item) of each item in order, computed ahead of time: `threads` + 2 of them.

  threads: None: one a core.
  """
  threads, pending = threads or cores(), collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == threads + 2:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def sample(source: Source, count: int = 4096) -> Sequence[Example]:
  """Examples to learn vocabularies from: the first `count` of a source that makes them when asked,
  and all of a list, or of a source that says `is_whole`."""
  if isinstance(source, list) or getattr(source, 'is_whole', False):
    return source
  if isinstance(source, Concatenated):
    return Concatenated([sample(part, count) for part in source.parts])
  return [source[i] for i in range(min(count, len(source)))]
