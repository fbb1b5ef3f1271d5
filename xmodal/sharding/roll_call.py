"""Roll call: the processes of one run find each other, and agree, before JAX joins them.

JAX ends a process with a C++ stack trace if another one is missing, is there twice or dies early.
Here process 0 waits on the coordinator's port for one line of JSON from each other process, and
answers all with an empty line, or with the reason why the run cannot start.
"""

from collections.abc import Mapping
import contextlib
import json
import socket
import time

from xmodal.errors import UserError

_LONGEST = 2**20  # bytes of a line
_SLOW = 5.0  # seconds that one connection may take to send its line
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
  present, links = {0: me}, []
  try:
    server = socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True,
                                  backlog=1024) if socket.has_dualstack_ipv6() else (
                                      socket.create_server(('', port), backlog=1024))
  except OSError as error:
    raise UserError(f'port {port} of the coordinator cannot be used on {me["host"]} '
                    f'({error.strerror}): another run uses it; give another --coordinator'
                    ) from error
  with server, contextlib.ExitStack() as closing:
    line = ''
    while len(present) < me['count'] and not line:
      server.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        link = closing.enter_context(server.accept()[0])
      except TimeoutError:
        missing = [str(n) for n in range(me['count']) if n not in present]
        shown = ', '.join(missing[:8]) + (', ...' if missing[8:] else '')
        line = (f'{len(present)} of {me["count"]} processes started within {wait:.0f} s; missing: '
                f'{shown}; start all of them, or wait longer with --wait')
        break
      if (other := _heard(link)) is not None:
        links.append(link)
        line = _complaint(me, other, present)
        present[other['number']] = other
    for link in links:
      with contextlib.suppress(OSError):
        link.sendall(line.encode() + b'\n')
  if line:
    raise UserError(line)


def _heard(link):
  """What a process said; None for a connection that is none of ours."""
  link.settimeout(_SLOW)
  try:
    other = json.loads(link.makefile('rb').readline(_LONGEST))
    return other if {'count', 'number', 'host', 'facts'} <= other.keys() else None
  except (OSError, ValueError, AttributeError):
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
        # Process 0 answers by its own deadline, which may begin later.
        link.settimeout(wait + _SLOW)
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
