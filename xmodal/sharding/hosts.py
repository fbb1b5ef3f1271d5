"""What the processes of one run tell each other beside their batches.

All goes through JAX's coordination service, which process 0 holds, and not through devices: a
process that waits for a collective hears it too. A run of one process has nobody to tell.
"""

import atexit
from collections.abc import Callable
import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time

_SECONDS = 0.5  # between looks at what others told
_PATIENCE = 20  # seconds in which process 0 waits for the others to hear that all end
# Keys of the service, and folders of keys with one a process.
_END, _STOP = 'xmodal/end/first', 'xmodal/stop/asked'
_PLACES, _HEARD = 'xmodal/places', 'xmodal/heard'
_tidying: list[Callable[[], None]] = []


def several() -> bool:
  """Whether this process is one of several that have joined in one run."""
  if 'jax' not in sys.modules:  # it takes seconds to import
    return False
  return _state().client is not None and _state().num_processes > 1


def agreed(value: bool) -> bool:
  """What process 0 says; all processes have to ask."""
  if not several():
    return value
  from jax.experimental import multihost_utils
  return bool(multihost_utils.broadcast_one_to_all(value))


def end_all(line: str, code: int, detail: str = '') -> None:
  """Ends every process of the run, whatever it waits for, with one line and one exit code.

  A collective without this process would never end. Of several processes that fail, the first is
  heard. Returns at once in a run of one process.

  Args:
    line: printed by all.
    code: exit code of all.
    detail: printed before the line by this process, if it is the first.
  """
  if several():
    listener().end(line, code, detail)


def before_exit(tidy: Callable[[], None]) -> None:
  """Registers what exit_now is to do first, such as to let go of files that others wait for."""
  _tidying.append(tidy)


def exit_now(code: int) -> None:
  """Ends this process at once, from any thread."""
  for tidy in _tidying:
    tidy()
  os._exit(code)


@functools.cache
def listener() -> 'Listener':
  """The one of this process, if it is one of several."""
  return Listener()


class Listener:
  """A thread that hears when to stop, and when all end.

  Attributes:
    asked: once set, all processes are asked to stop.
  """

  def __init__(self):
    self.asked = threading.Event()
    state = _state()
    self._client, self._me, self._count = state.client, state.process_id, state.num_processes
    self._closing, self._ending = threading.Event(), threading.Lock()
    # Held while the processes tell each other how far they are.
    self._moving, self._place, self._last = threading.Lock(), 0, None
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    atexit.register(self._close)  # comes before that of JAX, which ends the service

  def reached(self) -> bool:
    """Whether to stop here, once a process was asked to.

    All processes have to call this at the same places of the run. The one to stop at is the first
    that none of them has passed yet.
    """
    with self._moving:
      self._place += 1
      return self._place == self._last

  def end(self, line: str, code: int, detail: str) -> None:
    """See end_all."""
    try:
      first = _set_once(self._client, _END, json.dumps([line, code]))
    except RuntimeError:  # process 0 is no longer there
      first = True
    with contextlib.suppress(OSError, ValueError):  # they may be closed
      sys.stdout.flush()
      if first and detail:
        print(detail, file=sys.stderr, flush=True)
    self._end(line, code)

  def _listen(self):
    agreement = self._agree()
    while not self._closing.wait(_SECONDS):
      with contextlib.suppress(RuntimeError):  # a fault of the network: the next look may succeed
        if told := self._client.key_value_dir_get(os.path.dirname(_END)):
          self._end(*json.loads(told[0][1]))
        if self.asked.is_set():
          _set_once(self._client, _STOP, '')
        if self._client.key_value_dir_get(os.path.dirname(_STOP)):
          next(agreement, None)

  def _agree(self):
    """Settles where to stop; yields while others have not told how far they are."""
    with self._moving:
      told = ()
      while len(told) < self._count:
        with contextlib.suppress(RuntimeError):
          _set_once(self._client, f'{_PLACES}/{self._me}', str(self._place))
          told = self._client.key_value_dir_get(_PLACES)
        if len(told) < self._count:
          yield
      self._last = 1 + max(int(place) for _, place in told)

  def _end(self, line, code):
    self._ending.acquire()  # for good: of two threads one prints
    with contextlib.suppress(RuntimeError):
      line, code = json.loads(self._client.key_value_try_get(_END))
    with contextlib.suppress(OSError):
      os.write(2, f'{line}\n'.encode())  # print may wait for a lock of the other thread
    with contextlib.suppress(RuntimeError):
      self._client.key_value_set(f'{_HEARD}/{self._me}', '')
      deadline = time.monotonic() + _PATIENCE
      while self._me == 0 and time.monotonic() < deadline and (
          len(self._client.key_value_dir_get(_HEARD)) < self._count):
        time.sleep(0.05)
    exit_now(code)

  def _close(self):
    self._closing.set()
    self._thread.join()


class Counter:
  """Counts records that any of several processes meets, each once."""

  def __init__(self, name: str):
    """name: the same in all processes, and of no other counter."""
    self._name, self._total = name, 0

  def add(self, record: int) -> int:
    """Counts a record; returns how many were counted. Of several processes, the one that counts the
    last is told the number of all."""
    client = _state().client
    if _set_once(client, f'xmodal/counted/{self._name}/{record}', ''):
      self._total = client.key_value_increment(f'xmodal/counts/{self._name}', 1)
    return self._total


def exchange(text: str) -> list[str]:
  """The texts of several processes, of any length; all have to call it."""
  client, number = _state().client, next(_exchanges)
  folder = f'xmodal/exchange/{number}'
  client.key_value_set(f'{folder}/{_state().process_id}', text)
  while len(told := client.key_value_dir_get(folder)) < _state().num_processes:
    time.sleep(0.02)
  if _state().process_id == 0:  # whoever is here has read the one before
    client.key_value_delete(f'xmodal/exchange/{number - 1}/')
  return [text for _, text in told]


_exchanges = itertools.count()


def _state():
  # JAX has no public name for it; Orbax takes it from here too.
  from jax._src import distributed
  return distributed.global_state


def _set_once(client, key, text):
  """Whether no process had set it before."""
  try:
    client.key_value_set(key, text)
    return True
  except RuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise
    return False
