"""The folder of a run: on this machine, or in a bucket with a local side.

A run writes its small files (metrics, event files, config, assets, samples) on this machine. For a
run in a bucket that is its local side, a folder of the user's cache: `fetch` fills it from the
bucket, and `send` uploads what has changed. Checkpoints are not copied here, see
train.checkpoints.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import os
import re
import socket
import uuid

import jax

from xmodal import downloads, paths, storage
from xmodal.errors import UserError
from xmodal.train.checkpoints.checkpoint import ORBAX_WRITES
from xmodal.train.logs import goodput
from xmodal.train.logs.trackers import tracker
from xmodal.train.process import together

CHECKPOINTS = 'checkpoints'
# W&B uploads its own folder, in which files come and go.
_NOT_SENT = ('damaged', 'wandb')
# What a resumed run reads.
_READ_FILES = ('config.json', 'metrics.jsonl', 'best.json', 'left_out.json', 'final.json',
               goodput.FILE, tracker.RUN_ID)
_READ_FOLDERS = ('assets', 'tensorboard')
_SPECIAL = re.compile(r'[*?\[\\]')  # Orbax takes them for patterns


class RunFolder:
  """The folder of a run.

  Attributes:
    address: absolute path, or address in a bucket; shown to users.
    local: absolute path of the run's small files; `address` itself if it is on this machine.
  """

  def __init__(self, workdir: str):
    """workdir: as the user wrote it.

    Raises:
      UserError: it is no valid path or address, or this run cannot use such an address.
    """
    self.address = self.local = paths.resolved(workdir, '--workdir')
    self._sent: dict[str, tuple[int, int]] = {}
    if self.is_remote:
      _check(self.address)
      self.local = _local_side(self.address)

  @property
  def is_remote(self) -> bool:
    """Whether the run is in a bucket."""
    return storage.is_remote(self.address)

  def check_writable(self) -> None:
    """Raises UserError if files cannot be written to the bucket; all processes must call it."""
    if self.is_remote:
      together.agree(lambda: _probe(self.address), lead=True)

  def fetch(self) -> None:
    """Makes the local side equal to the bucket, but for files that no run reads.

    Local files that are missing in the bucket are deleted. Not for use while a run of this machine
    writes to it.
    """
    if not self.is_remote:
      return
    os.makedirs(self.local, exist_ok=True)
    names = [name for name in storage.list_dir(self.address) if name in _READ_FILES]
    for folder in _READ_FOLDERS:
      names += [f'{folder}/{name}'
                for name in storage.entries(os.path.join(self.address, folder))]
    # Other processes of the run, on the same machine, may read files that are in the bucket.
    for name in set(_small_files(self.local)) - set(names):
      with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(self.local, name))
    downloads.download(self.address, names, self.local)
    self._sent = {name: _stamp(os.path.join(self.local, name)) for name in names}

  def send(self) -> None:
    """Uploads the files that changed since the last call; only the first process does it.

    Raises:
      UserError: the bucket cannot be written to.
    """
    if not self.is_remote or jax.process_index() != 0:
      return
    now = {name: _stamp(os.path.join(self.local, name)) for name in _small_files(self.local)}
    changed = [name for name, stamp in now.items() if self._sent.get(name) != stamp]
    storage.copy_all(storage.upload, ((os.path.join(self.local, name), f'{self.address}/{name}')
                                      for name in changed))
    for name in self._sent.keys() - now.keys():  # event files of earlier starts
      storage.remove(f'{self.address}/{name}')
    self._sent = now

  @contextlib.contextmanager
  def sent_at_the_end(self) -> Iterator[None]:
    """Context manager that uploads on every way out."""
    try:
      yield
    except BaseException:
      with contextlib.suppress(UserError, OSError):  # the first error says more
        self.send()
      raise
    self.send()


def _check(address):
  if found := _SPECIAL.search(address):
    raise UserError(f'--workdir {address}: the address of a run cannot contain {found[0]}; give '
                    'another')
  kind = storage.scheme(address)
  if kind == 'hf':
    raise UserError(f'--workdir {address}: each file written to hf:// is a commit, too slow for a '
                    'run; wanted gs://, s3://, az:// or a folder; upload it when it has ended')
  if kind not in ORBAX_WRITES and jax.process_count() > 1:
    raise UserError(f'--workdir {address}: of {jax.process_count()} processes; several can write '
                    'their checkpoints to gs:// or to a folder that all share; wanted one of them')


def _local_side(address):
  base = paths.cache('runs')
  if base is None:
    raise UserError(f'--workdir {address}: a run in a bucket needs a folder on this machine, and '
                    'this user has no cache folder; set XDG_CACHE_HOME to a folder')
  # Several machines may share a home folder.
  key = hashlib.sha256(f'{socket.gethostname()} {address}'.encode()).hexdigest()[:12]
  return os.path.join(base, f'{downloads.readable(address)}-{key}')


def _probe(address):
  path = f'{address}/.writable-{uuid.uuid4().hex}'
  try:
    storage.write(path, b'1')
  except FileNotFoundError as error:
    raise UserError(f'--workdir {address}: there is no such bucket; make it, or give another'
                    ) from error
  storage.remove(path)
  return ''


def _small_files(folder):
  """The names of all files but checkpoints and unfinished ones, relative to the folder."""
  for place, folders, names in os.walk(folder):
    if place == folder:
      folders[:] = [name for name in folders if name not in (CHECKPOINTS, *_NOT_SENT)]
    folders[:] = [name for name in folders if not name.endswith('.part')]
    for name in names:
      if not name.endswith('.part'):
        yield os.path.relpath(os.path.join(place, name), folder)


def _stamp(path):
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns
