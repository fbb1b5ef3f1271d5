"""Prefetches batches onto the devices."""

from collections.abc import Callable, Iterator
import queue
import threading

import jax

from xmodal.sharding import mesh as meshes


class Prefetch:
  """Reads host batches in a thread and shards them over the mesh, `depth` batches ahead."""

  def __init__(self, make_iterator: Callable[[], Iterator[dict]], mesh, batch_size: int,
               depth: int = 2):
    """Starts immediately, so that reading overlaps with compilation."""
    self._queue = queue.Queue(depth)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(make_iterator, mesh, batch_size),
                                    daemon=True)
    self._thread.start()

  def _fill(self, make_iterator, mesh, batch_size):
    try:
      for batch in make_iterator():
        if not self._put((meshes.put_batch(batch, mesh, batch_size), None)):
          return
      self._put((None, StopIteration()))
    except BaseException as error:  # raised by `next`
      self._put((None, error))

  def _put(self, item):
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def next(self) -> dict[str, jax.Array]:
    """The next batch; re-raises errors of the reading thread."""
    batch, error = self._queue.get()
    if error is not None:
      raise error
    return batch

  def close(self) -> None:
    """Stops reading."""
    self._stop.set()
    self._thread.join()
