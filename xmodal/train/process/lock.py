"""Workdir lock, one run at a time: WORKDIR/running.json names the process that holds it.

The file is created exclusively, which works on NFS too; there, system locks (flock, fcntl) hold
for one host only, or not at all. The holder touches the file every BEAT seconds. A holder on the
same machine has ended when its process has. A holder on another machine counts as ended when it has
not touched the file for LIMIT seconds. All processes of one run are one holder.

In a bucket no file can be created exclusively on every kind of storage: the file is written, and
read back after _SETTLE seconds; of several that wrote it the last one holds the workdir. A touch
writes it again, with the time.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
import uuid

import jax

from xmodal import storage
from xmodal.errors import UserError
from xmodal.sharding import hosts
from xmodal.train.process import together

FILE = 'running.json'
BEAT, LIMIT = 5.0, 60.0
_SETTLE = 2.0  # seconds; longer than a write to a bucket takes
_LOOKS = 10.0  # seconds within which all hosts must see a file that one host made
_mine: dict[str, str] = {}  # path of each file made by this process -> its token


@dataclasses.dataclass(frozen=True)
class _Holder:
  """A process, as written in the file.

  Attributes:
    host, pid, since: shown to users.
    machine: boot and namespace that pid belongs to; '' if unknown.
    started: start of the process, in ticks since boot; tells it from a later process with its pid.
    token: unique to this hold.
    touched: time of the last touch, in a bucket; files on disks have their own.
  """

  host: str = 'an unknown host'
  pid: int = 0
  since: str = 'an unknown time'
  machine: str = ''
  started: int = 0
  token: str = ''
  touched: float = 0.0

  def __str__(self):
    return f'process {self.pid} on {self.host}, since {self.since}'


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Locks a workdir, which is created if missing.

  Raises:
    UserError: another run uses it, or the hosts of this run do not share it.
  """
  path = os.path.join(workdir, FILE)
  holder = _Holder(**json.loads(together.agree(lambda: _take(workdir), lead=True)))
  try:
    if jax.process_count() > 1 and not storage.is_remote(workdir):
      together.agree(lambda: _check_seen(workdir, FILE, holder.token))
    with _beating(path, holder):
      yield
  finally:
    _let_go()


def _let_go():
  """Removes the files of this process's holds."""
  while _mine:
    path, token = _mine.popitem()
    with contextlib.suppress(OSError, UserError):  # a bucket may not answer
      if _read(path)[0].token == token:
        storage.remove(path)


def check_free(workdir: str) -> None:
  """Raises UserError if another run uses the workdir, or the hosts of this run do not share it.

  An early check, before the work that precedes `hold`. Leaves no file behind.
  """
  together.agree(lambda: _check_held(workdir), lead=True)
  if jax.process_count() == 1 or storage.is_remote(workdir):
    return
  made = []
  name = together.agree(lambda: _probe(workdir, made), lead=True)
  try:
    together.agree(lambda: _check_seen(workdir, name, ''))
  finally:
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        os.unlink(os.path.join(workdir, name))
        for folder in made:
          os.rmdir(folder)


def _check_held(workdir):
  path = os.path.join(workdir, FILE)
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    other, _ = _read(path)
    # `hold` checks a holder on another host, which may take LIMIT seconds.
    if _is_here(other) and _runs(other):
      raise _held(workdir, other)
  return ''


def _held(workdir, other):
  return UserError(f'{workdir} is in use: {other}, trains or evaluates there; wait for it to '
                   'end, stop it, or give another --workdir')


def _take(workdir):
  """Creates the file; returns its content."""
  storage.make_dirs(workdir)
  path = os.path.join(workdir, FILE)
  me = _Holder(socket.gethostname(), os.getpid(), time.strftime('%Y-%m-%d %H:%M:%S'), _machine(),
               _start_of(os.getpid()) or 0, uuid.uuid4().hex)
  while True:
    try:
      return _create(path, me)
    except FileExistsError:
      pass
    with contextlib.suppress(FileNotFoundError):  # its holder has ended meanwhile
      other, touched = _read(path)
      if not _is_here(other):
        _wait_for_beat(workdir, path, other, touched)
      elif _runs(other):
        raise _held(workdir, other)
      _remove(path, other)


def _create(path, holder):
  if storage.is_remote(path):
    return _create_in_bucket(path, holder)
  text = json.dumps(dataclasses.asdict(holder))
  descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
  with open(descriptor, 'w', encoding='utf-8') as f:
    f.write(text)
  _mine[path] = holder.token
  return text


def _create_in_bucket(path, holder):
  if storage.is_file(path):
    raise FileExistsError(path)
  text = _touch(path, holder)
  time.sleep(_SETTLE)
  with contextlib.suppress(FileNotFoundError):
    if _read(path)[0].token == holder.token:
      _mine[path] = holder.token
      return text
  raise FileExistsError(path)


def _touch(path, holder):
  """Touches the file of a holder; returns its content in a bucket."""
  if not storage.is_remote(path):
    os.utime(path)
    return ''
  text = json.dumps(dataclasses.asdict(dataclasses.replace(holder, touched=time.time())))
  storage.write(path, text.encode())
  return text


def _read(path) -> tuple[_Holder, float]:
  """The holder in the file (an unknown one if it is incomplete), and the time of its last touch."""
  if storage.is_remote(path):
    data = storage.read(path)
    try:
      holder = _Holder(**json.loads(data))
      return holder, holder.touched
    except (ValueError, TypeError):
      return _Holder(), math.inf
  # Opening the file makes NFS fetch its attributes from the server.
  with open(path, encoding='utf-8', errors='replace') as f:
    touched = os.fstat(f.fileno()).st_mtime
    try:
      return _Holder(**json.load(f)), touched
    except (ValueError, TypeError):
      return _Holder(), touched


def _remove(path, other):
  """Removes the file of an ended holder, unless another run has replaced it."""
  if storage.is_remote(path):
    if _read(path)[0].token == other.token:
      storage.remove(path)
    return
  aside = f'{path}.{other.token or "cut"}'
  os.rename(path, aside)
  if _read(aside)[0].token != other.token:  # another run was quicker: restore its file
    with contextlib.suppress(FileExistsError):
      os.link(aside, path)
  os.unlink(aside)


def _is_here(holder):
  return holder.machine != '' and holder.machine == _machine()


def _runs(holder):
  """Whether a process of this machine runs and is not exiting."""
  try:
    os.kill(holder.pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # another user's
    pass
  return _start_of(holder.pid) in (holder.started, None)


def _wait_for_beat(workdir, path, other, touched):
  """Waits until a holder on another machine has not touched its file for LIMIT seconds.

  Raises:
    UserError: the holder touches it.
  """
  # Clocks of hosts differ, but not by hours.
  wait = 0.0 if time.time() - touched > max(3600.0, 2 * LIMIT) else LIMIT
  if wait:
    print(f'{path}: {other}, may still be running; watching it for up to {LIMIT:.0f} s',
          file=sys.stderr, flush=True)
  ends = time.monotonic() + wait
  while time.monotonic() < ends:
    time.sleep(BEAT / 5)
    now, then = _read(path)
    if now.token != other.token or then != touched:
      raise _held(workdir, now)


hosts.before_exit(_let_go)


@contextlib.contextmanager
def _beating(path, holder):
  """Touches the file from a thread of the first process."""
  if jax.process_index() != 0:
    yield
    return
  ended = threading.Event()

  def beat():
    while not ended.wait(BEAT):
      # After a disk outage the next beat tries again.
      with contextlib.suppress(OSError, UserError):
        try:
          other, _ = _read(path)
        except FileNotFoundError:  # a user removed it
          _create(path, holder)
          continue
        if ended.is_set():  # a bucket may answer late, when the file is removed
          return
        if other.token and other.token != holder.token:
          # Suspended for longer than LIMIT, so two runs would now write to one folder.
          os.write(2, f'error: {path}: {other}, has taken over this workdir\n'.encode())
          os._exit(2)
        _touch(path, holder)

  thread = threading.Thread(target=beat, name='holds the workdir', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(BEAT)  # it may hang on an unresponsive disk


def _probe(workdir, made):
  """Creates a file that all hosts must see, in a folder that may be new; returns its name."""
  folder = workdir
  while not os.path.isdir(folder):
    made.append(folder)
    folder = os.path.dirname(folder)
  os.makedirs(workdir, exist_ok=True)
  name = f'.shared-{uuid.uuid4().hex}'
  with open(os.path.join(workdir, name), 'w', encoding='utf-8'):
    return name


def _check_seen(workdir, name, token):
  """Raises UserError if this process does not see the file that process 0 made."""
  ends = time.monotonic() + _LOOKS
  while True:
    with contextlib.suppress(OSError):
      if name in os.listdir(workdir) and (
          not token or _read(os.path.join(workdir, name))[0].token == token):
        return ''
    if time.monotonic() > ends:
      raise UserError(f'--workdir {workdir}: {together.here()} does not see files of process 0 '
                      'there; wanted a folder that all hosts of the run share (NFS, Lustre, ...)')
    time.sleep(0.2)


def _machine():
  """Boot id of this machine and its pid namespace; '' without /proc."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as f:
      return f'{f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _start_of(pid):
  """Start time of a process, in ticks since boot; -1 if it is exiting, None if unknown."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as f:
      fields = f.read().rpartition(')')[2].split()
  except OSError:
    return None
  state, flags, started = fields[0], int(fields[6]), int(fields[19])
  return -1 if state in 'ZX' or flags & 4 else started  # 4: PF_EXITING of the kernel's sched.h
