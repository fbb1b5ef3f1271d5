"""What the server accepts, and how it refuses the rest: a status and one line of JSON."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import threading


class Refused(Exception):
  """An answer to a client other than 200.

  Attributes:
    status: of HTTP.
    code: a short name for programs.
    message: one line for people.
    retry_after: seconds after which trying again makes sense; None: no header.
  """

  def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
    super().__init__(message)
    self.status, self.code, self.message = status, code, ' '.join(message.split())
    self.retry_after = retry_after

  @property
  def body(self) -> dict:
    """The JSON of the response."""
    kind = 'invalid_request_error' if self.status < 500 else 'server_error'
    return {'error': {'message': self.message, 'type': kind, 'code': self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of requests; the defaults suit a machine of 8 GiB.

  Attributes:
    body_bytes: of a request (413).
    pixels: of a picture, by its header (422).
    text: characters of a text (422).
    requests: in one call (422).
    pictures: in one request of a task that ranks (422).
    drawn: pictures to draw in one request (422).
    steps: of drawing (422).
    depth: of nested JSON (400).
    values: of JSON, with the names in objects (400).
    header_bytes: of a request's head (431; 400 if it does not end).
    connections: open at once (503).
    waiting: calls that are read, waiting or answered at once (503).
    held_bytes: of all bodies and decoded pictures at once (503); as many again are for decoding,
      where pictures wait for each other.
    header_seconds: from a connection to the end of the request's head (408).
    body_seconds: to read a body (408).
    read_seconds: in which a client reads the rest of a response, or 256 KiB of it (it is cut off).
    answer_seconds: from the end of the body to the answer (504).
  """

  body_bytes: int = 16 * 2**20
  pixels: int = 25_000_000
  text: int = 2_000
  requests: int = 32
  pictures: int = 32
  drawn: int = 4
  steps: int = 100
  depth: int = 20
  values: int = 10_000
  header_bytes: int = 16_384
  connections: int = 512
  waiting: int = 128
  held_bytes: int = 512 * 2**20
  header_seconds: float = 10.0
  body_seconds: float = 20.0
  read_seconds: float = 10.0
  answer_seconds: float = 60.0


class Admission:
  """Counts the calls and the bytes that are in the server."""

  def __init__(self, limits: Limits, on_change: Callable[[], None] = lambda: None):
    """`on_change` is called when a call is no longer coming."""
    self.limits, self._lock, self._on_change = limits, threading.Lock(), on_change
    self.calls = self.coming = self.held = 0

  def enter(self) -> 'Call':
    """Counts a call, whose `leave` ends it; Refused if there are too many."""
    with self._lock:
      if self.calls >= self.limits.waiting:
        raise Refused(503, 'overloaded', f'{self.calls} requests are waiting; try again later', 1)
      self.calls += 1
      self.coming += 1
    return Call(self)

  def change(self, calls: int = 0, coming: int = 0, held: int = 0) -> None:
    """Adds to the counts; Refused if there are too many bytes."""
    with self._lock:
      if held > 0 and self.held + held > self.limits.held_bytes:
        raise Refused(503, 'overloaded', 'the requests that are waiting fill the memory that is '
                      'set aside for them; try again later', 1)
      self.calls += calls
      self.coming += coming
      self.held += held
    if coming:
      self._on_change()


class Call:
  """One call between its head and its answer."""

  def __init__(self, admission: Admission):
    self._admission, self._held, self._is_coming = admission, 0, True
    self._is_given_up = False

  def give_up(self) -> None:
    """Nobody waits for the answer: what still reads the call is refused the next bytes."""
    self._is_given_up = True

  def hold(self, count: int) -> None:
    """Counts bytes that are kept until the call leaves; Refused if there are too many."""
    if self._is_given_up:
      raise Refused(499, 'left', 'nobody waits for the answer')
    self._admission.change(held=count)
    self._held += count

  def arrived(self) -> None:
    """The call's requests are in the queue."""
    if self._is_coming:
      self._is_coming = False
      self._admission.change(coming=-1)

  def leave(self) -> None:
    """Ends the call; only the first time counts."""
    self.arrived()
    if self._admission is not None:
      self._admission.change(calls=-1, held=-self._held)
      self._admission = None


class Room:
  """Memory for short work of threads; work for which too little is left waits."""

  def __init__(self, size: int):
    """`size` in bytes."""
    self._size = self._free = size
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def taken(self, count: int) -> Iterator[None]:
    """Takes bytes once they are free; work that wants more than there are runs alone."""
    count = min(count, self._size)
    with self._changed:
      self._changed.wait_for(lambda: self._free >= count)
      self._free -= count
    try:
      yield
    finally:
      with self._changed:
        self._free += count
        self._changed.notify_all()
