"""Messages between the processes of one run: when to stop, failures, counts and texts.

They go through JAX's coordination service, which runs in process 0, and not through devices: a
process that waits for a collective receives them too. A run of one process sends none.
"""

import atexit
from collections.abc import Callable
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time

_POLL_SECONDS = 0.5  # between polls of the service
_PIECE = 1 << 19  # characters of a message
_BEAT = 3.0  # seconds between signs of life of a process
# Exit code if the same command resumes the run: EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75
_TIDY_SECONDS = 5
_END_TIMEOUT = 10  # seconds that process 0 waits until the others have received the end of the run
# Keys of the service, and folders with one key per process.
_END, _STOP = 'xmodal/end/first', 'xmodal/stop/requested'
_PLACES, _RECEIVED, _ALIVE = 'xmodal/places', 'xmodal/heard', 'xmodal/alive'
_ENDED = 'ended'
_cleanups: list[Callable[[], None]] = []
_handlers = []


def several() -> bool:
  """Whether the run has several processes."""
  if 'jax' not in sys.modules:  # it takes seconds to import
    return False
  return _state().client is not None and _state().num_processes > 1


def agreed(value: bool) -> bool:
  """The value of process 0; all processes must call it."""
  if not several():
    return value
  from jax.experimental import multihost_utils
  return bool(multihost_utils.broadcast_one_to_all(value))


def end_all(line: str, code: int, detail: str = '') -> None:
  """Ends every process of the run with one line and one exit code, even while it waits.

  Without this, the others would wait forever in a collective. If several processes fail, the
  first one's line and code are used. Returns at once in a run of one process.

  Args:
    line: printed by all processes.
    code: exit code of all processes.
    detail: printed before the line by this process, if it is the first to fail.
  """
  if several():
    listener().end(line, code, detail)


def before_exit(tidy: Callable[[], None]) -> None:
  """Registers cleanup for exit_now, such as releasing files that other processes wait for."""
  _cleanups.append(tidy)


def exit_now(code: int) -> None:
  """Ends this process immediately, from any thread."""
  def tidy_up():
    for tidy in _cleanups:
      tidy()

  # A bucket that does not answer must not keep the process.
  thread = threading.Thread(target=tidy_up, daemon=True)
  try:
    thread.start()
    thread.join(_TIDY_SECONDS)
  finally:
    os._exit(code)


def end_with_first(address: tuple[str, int]) -> None:
  """Makes this process end with one line and EXIT_CODE when process 0 dies.

  JAX ends it with abort(), from a thread of its own, as soon as its connection to process 0 breaks,
  and offers no callback that works (jaxlib 0.10.2: std::bad_cast). Python runs its own handlers of
  signals in the main thread, which would be too late; so this is one in C.

  Args:
    address: (host, port) of JAX's service in process 0. An abort while it answers is a defect.
  """
  set_handler = ctypes.CDLL(None).signal
  set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def aborted(number):
    set_handler(number, None)  # the default, for when this returns
    try:
      socket.create_connection(address, timeout=_TIDY_SECONDS).close()
    except OSError:
      os.write(2, b'process 0 died; run the same command again to resume\n')
      exit_now(EXIT_CODE)

  _handlers.append(aborted)  # C keeps no reference
  set_handler(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))


@functools.cache
def listener() -> 'Listener':
  """The Listener of this process, in a run of several."""
  return Listener()


class Listener:
  """A thread that receives requests to stop, and the end of the run.

  Attributes:
    stop_requested: event; setting it requests all processes to stop.
    lost: seconds without a sign of life after which a process counts as dead.
  """

  lost = 25  # JAX's own limit, after which it ends all with a stack trace, is 100

  def __init__(self):
    self.stop_requested = threading.Event()
    state = _state()
    self._client, self._process_id = state.client, state.process_id
    self._count = state.num_processes
    self._closing, self._end_lock = threading.Event(), threading.Lock()
    self._beat, self._beat_at, self._silent = 0, 0.0, 0
    # The last sign of life of each process, and its time; one that dies at once gives none.
    self._seen = {f'{_ALIVE}/{number}': ('', time.monotonic()) for number in range(self._count)}
    self._answered = threading.Event()
    # Held while the processes exchange their places in the run.
    self._place_lock, self._place, self._last = threading.Lock(), 0, None
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    if self._process_id != 0:
      threading.Thread(target=self._watch_first, daemon=True).start()
    atexit.register(self._close)  # runs before JAX's handler, which ends the service

  def reached(self) -> bool:
    """Whether to stop here, once a stop was requested.

    All processes must call this at the same places of the run. They stop at the first place that
    none of them has passed.
    """
    with self._place_lock:
      self._place += 1
      return self._place == self._last

  def end(self, line: str, code: int, detail: str) -> None:
    """See end_all."""
    try:
      first = _set_once(self._client, _END, json.dumps([line, code]))
    except RuntimeError:  # process 0 has ended
      first = True
    with contextlib.suppress(OSError, ValueError):  # the streams may be closed
      sys.stdout.flush()
      if first and detail:
        print(detail, file=sys.stderr, flush=True)
    self._end(line, code)

  def _listen(self):
    agreement = self._agree()
    while not self._closing.wait(_POLL_SECONDS):
      with contextlib.suppress(RuntimeError):  # network error: the next poll may succeed
        self._watch()
        if ended := self._client.key_value_dir_get(os.path.dirname(_END)):
          self._end(*json.loads(ended[0][1]))
        if self.stop_requested.is_set():
          _set_once(self._client, _STOP, '')
        if self._client.key_value_dir_get(os.path.dirname(_STOP)):
          next(agreement, None)
        self._answered.set()

  def _watch(self):
    """Gives signs of life, and ends the run if process 0 misses those of another.

    The others watch process 0: see end_with_first and _watch_first.
    """
    now = time.monotonic()
    if now < self._beat_at:
      return
    self._beat_at, self._beat = now + _BEAT, self._beat + 1
    self._client.key_value_set(f'{_ALIVE}/{self._process_id}', str(self._beat),
                               allow_overwrite=True)
    if self._process_id != 0:
      return
    signs = dict(self._client.key_value_dir_get(_ALIVE))
    for key, (last, seen_at) in self._seen.items():
      value = signs.get(key, '')
      if value != last:
        self._seen[key] = value, now
      elif value != _ENDED and now - seen_at > self.lost:
        self._silent += 1
        self.end(f'process {key.rpartition("/")[2]} gave no sign of life for {self.lost} s; run '
                 'the same command again to resume', EXIT_CODE, '')

  def _watch_first(self):
    """Ends this process if process 0 stops answering while its connections stay open, as of a
    machine that hangs; a call to its service then never returns."""
    waited = 0  # counted, not read from a clock, which goes on while this process is suspended
    while waited <= self.lost and not self._closing.wait(1):
      waited = 0 if self._answered.is_set() else waited + 1
      self._answered.clear()
    if not self._closing.is_set():
      os.write(2, f'process 0 gave no answer for {self.lost} s; run the same command again to '
               'resume\n'.encode())
      exit_now(EXIT_CODE)

  def _agree(self):
    """Determines where to stop; yields until all processes have reported their places."""
    with self._place_lock:
      places = ()
      while len(places) < self._count:
        with contextlib.suppress(RuntimeError):
          _set_once(self._client, f'{_PLACES}/{self._process_id}', str(self._place))
          places = self._client.key_value_dir_get(_PLACES)
        if len(places) < self._count:
          yield
      self._last = 1 + max(int(place) for _, place in places)

  def _end(self, line, code):
    self._end_lock.acquire()  # never released: only one of two threads prints
    with contextlib.suppress(RuntimeError):
      line, code = json.loads(self._client.key_value_try_get(_END))
    with contextlib.suppress(OSError):
      os.write(2, f'{line}\n'.encode())  # print could wait for a lock held by another thread
    with contextlib.suppress(RuntimeError):
      self._client.key_value_set(f'{_RECEIVED}/{self._process_id}', '')
      deadline = time.monotonic() + _END_TIMEOUT
      while self._process_id == 0 and time.monotonic() < deadline and (
          len(self._client.key_value_dir_get(_RECEIVED)) < self._count - self._silent):
        time.sleep(0.05)
    exit_now(code)

  def _close(self):
    self._closing.set()
    self._thread.join()
    with contextlib.suppress(RuntimeError):  # or process 0 would wait for signs of life
      self._client.key_value_set(f'{_ALIVE}/{self._process_id}', _ENDED, allow_overwrite=True)


class GlobalCounter:
  """Counts distinct records over all processes."""

  def __init__(self, name: str):
    """name: unique to this counter, and the same in all processes."""
    self._name, self._total = name, 0

  def add(self, record: int) -> int:
    """Counts a record once; returns the total so far. The process that counts last gets the full
    total; others may return an older one."""
    client = _state().client
    if _set_once(client, f'xmodal/counted/{self._name}/{record}', ''):
      self._total = client.key_value_increment(f'xmodal/counts/{self._name}', 1)
    return self._total


def exchange(text: str) -> list[str]:
  """The texts of all processes, of any length; all processes must call it."""
  client, number = _state().client, next(_exchanges)
  folder = f'xmodal/exchange/{number}'
  client.key_value_set(f'{folder}/{_state().process_id}', text)
  for pause in itertools.chain([0.02] * 50, itertools.repeat(_POLL_SECONDS)):
    texts = []
    with contextlib.suppress(RuntimeError):  # network error: the next poll may succeed
      texts = client.key_value_dir_get(folder)
    if len(texts) == _state().num_processes:
      break
    time.sleep(pause)
  if _state().process_id == 0:  # all processes have read the previous exchange
    client.key_value_delete(f'xmodal/exchange/{number - 1}/')
  return [text for _, text in texts]


def from_first(text: str) -> str:
  """The text of process 0, of any length; all processes must call it, the others with ''."""
  count, *_ = exchange(str(-(-len(text) // _PIECE)))
  return ''.join(exchange(text[i * _PIECE:(i + 1) * _PIECE])[0] for i in range(int(count)))


_exchanges = itertools.count()


def _state():
  # JAX has no public name for it; Orbax uses the same private one.
  from jax._src import distributed
  return distributed.global_state


def _set_once(client, key, text):
  """Sets a key unless it is set; returns whether it was not."""
  try:
    client.key_value_set(key, text)
    return True
  except RuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise
    return False
