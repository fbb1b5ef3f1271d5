"""Roll call: the processes of one run find each other, and agree, before JAX joins them.

JAX ends a process with a C++ stack trace if another one is missing, is there twice or dies early.
Here process 0 waits on the coordinator's port for one line of JSON from each other process, and
answers all with an empty line, or with the reason why the run cannot start.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import selectors
import socket
import time

from xmodal.errors import UserError

_LONGEST = 2**20  # bytes of a line
_SLOW = 5.0  # seconds for connecting, and after the deadline for the answer of process 0
_PAUSE = 0.2


def parse(address: str) -> tuple[str, int]:
  """(host, port) of 'HOST:PORT'; UserError if it is something else."""
  host, _, port = address.rpartition(':')
  host = host.removeprefix('[').removesuffix(']')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(f'--coordinator={address}: wanted HOST:PORT of process 0, such as '
                    'node1:8476')
  return host, int(port)


def meet(address: str, count: int, number: int, facts: Mapping[str, str], wait: float) -> None:
  """Returns once all processes are there and agree.

  Args:
    address: HOST:PORT at which process 0 waits.
    count: number of processes.
    number: of this process, from 0.
    facts: what all must agree on: name -> value, such as 'config.seed' -> '0'.
    wait: seconds to wait for the others.

  Raises:
    UserError: a process is missing, is there twice, or says something else than process 0.
  """
  if count == 1:
    return
  host, port = parse(address)
  me = {'count': count, 'number': number, 'host': socket.gethostname(), 'facts': dict(facts)}
  deadline = time.monotonic() + wait
  if number == 0:
    _lead(port, me, deadline, wait)
  else:
    _follow(host, port, me, deadline, wait)


def _lead(port, me, deadline, wait):
  present, line = {0: me}, ''
  try:
    server = socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True,
                                  backlog=1024) if socket.has_dualstack_ipv6() else (
                                      socket.create_server(('', port), backlog=1024))
  except OSError as error:
    raise UserError(f'port {port} of the coordinator cannot be used on {me["host"]} '
                    f'({error.strerror}): another run uses it; give another --coordinator'
                    ) from error
  with server, selectors.DefaultSelector() as ready, contextlib.ExitStack() as closing:
    ready.register(server, selectors.EVENT_READ)
    links = []
    while len(present) < me['count'] and not line:
      if (left := deadline - time.monotonic()) <= 0:
        missing = [str(n) for n in range(me['count']) if n not in present]
        shown = ', '.join(missing[:8]) + (', ...' if missing[8:] else '')
        line = (f'{len(present)} of {me["count"]} processes started within {wait:.0f} s; missing: '
                f'{shown}; start all of them, or wait longer with --wait')
      for key, _ in ready.select(left):
        if (link := key.data) is None:
          link = _Link(closing.enter_context(server.accept()[0]))
          link.socket.setblocking(False)
          ready.register(link.socket, selectors.EVENT_READ, link)
          continue
        other = link.receive()
        if link.closed:
          ready.unregister(link.socket)
          link.socket.close()
        if link.closed and link in links:  # it waited no longer
          links.remove(link)
          present.pop(link.number, None)  # two may have called with one number
        if other is not None:
          links.append(link)
          line = line or _complaint(me, other, present)
          link.number = other['number']
          present[link.number] = other
    for link in links:
      link.socket.settimeout(_SLOW)
      with contextlib.suppress(OSError):
        link.socket.sendall(line.encode() + b'\n')
  if line:
    raise UserError(line)


@dataclasses.dataclass(eq=False)
class _Link:
  """A connection to process 0.

  Attributes:
    number: of the process at its other end, once that has called.
    closed: by the other end, or to be closed because it is no process of a run.
  """

  socket: socket.socket
  number: int | None = None
  closed: bool = False
  _text: bytes = b''

  def receive(self):
    """What the other process says, if its line is complete: {'count', 'number', ...}."""
    try:
      part = self.socket.recv(2**16)
    except BlockingIOError:
      return None
    except OSError:
      part = b''
    self._text += part
    self.closed = not part or len(self._text) > _LONGEST
    if self.number is not None or not self._text.endswith(b'\n'):
      return None
    try:
      other = json.loads(self._text)
      if {'count', 'number', 'host', 'facts'} <= other.keys():
        return other
    except (ValueError, AttributeError):
      pass
    self.closed = True
    return None


def _complaint(me, other, present):
  """Why a process cannot take part; '' if it can."""
  number, where = other['number'], f'process {other["number"]} on {other["host"]}'
  if other['count'] != me['count']:
    return (f'{where} was started as one of {other["count"]} processes, process 0 as one of '
            f'{me["count"]}; start all with the same number')
  if number in present:
    return (f'two processes are number {number}, on {present[number]["host"]} and {other["host"]}; '
            'give each its own --process_id')
  for name in sorted(me['facts'].keys() | other['facts'].keys()):
    ours, theirs = (one['facts'].get(name, 'missing') for one in (me, other))
    if ours != theirs:
      return (f'{name} is {theirs} for {where}, and {ours} for process 0 on {me["host"]}; start '
              'all with the same command and the same versions')
  return ''


def _follow(host, port, me, deadline, wait):
  reason = 'no answer'
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, port), timeout=_SLOW) as link:
        link.sendall(json.dumps(me).encode() + b'\n')
        # Process 0 answers at its deadline, which may be a little later.
        link.settimeout(max(deadline - time.monotonic(), 0) + _SLOW)
        answer = link.makefile('rb').readline(_LONGEST)
      if answer.endswith(b'\n'):
        if line := answer.decode().strip():
          raise UserError(line)
        return
      reason = 'process 0 ended'
    except (OSError, UnicodeError) as error:  # UnicodeError: no valid name of a host
      reason = getattr(error, 'strerror', None) or str(error) or 'no answer'
    time.sleep(_PAUSE)
  raise UserError(f'process 0 cannot be reached at {host}:{port} within {wait:.0f} s ({reason}); '
                  'start it, name its address with --coordinator, or wait longer with --wait')
