"""Files and folders on this machine and in buckets: gs://, s3://, hf:// and az://, through fsspec.

Paths are text in both cases, and os.path.join works on both. What is read or written of a bucket is
tried again while it does not answer, for up to `PATIENCE` seconds; a missing package, credentials
or bucket end in one line.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import logging
import os
import posixpath
import sys
import time
from typing import IO, Any, NamedTuple, TypeVar

from xmodal.errors import UserError, disk_is_full

# scheme -> (module that fsspec needs, what installs it)
_PACKAGES = {'gs': ('gcsfs', 'xmodal[gcs]'), 's3': ('s3fs', 'xmodal[s3]'),
             'hf': ('huggingface_hub', 'huggingface-hub'), 'az': ('adlfs', 'adlfs')}
PATIENCE = 120.0  # seconds
_PAUSES = (1, 2, 4, 8, 15)  # seconds between attempts; then the last one
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
AT_ONCE = 32  # requests: each takes tens of milliseconds, however little it reads
_reported: set[str] = set()  # buckets
_failing_since: dict[str, float] = {}  # bucket -> first failed request since it last answered
# What the listings of fsspec's file systems call the version of a file.
_VERSIONS = ('generation', 'etag', 'ETag', 'blob_id', 'mtime', 'LastModified', 'last_modified')

S, T = TypeVar('S'), TypeVar('T')


class Unreachable(UserError):
  """A bucket did not answer: nothing is known of its files."""


class AccessRefused(UserError):
  """A bucket refused, as credentials are missing or have expired: nothing is known of its files."""


class FileInfo(NamedTuple):
  """A file of a bucket, as its listing describes it.

  Attributes:
    size: bytes.
    version: changes with the content.
    crc32c: checksum of the content in base64, from gs://; '' from others.
  """

  size: int
  version: str
  crc32c: str


def scheme(path: str | os.PathLike) -> str:
  """'gs' for gs://bucket/folder; '' for a path on this machine."""
  name, found, _ = os.fspath(path).partition('://')
  return name.lower() if found and name.isalnum() and len(name) > 1 else ''


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket of a kind that is read."""
  return scheme(path) in _PACKAGES


def check(path: str, name: str) -> None:
  """Raises UserError for an address that cannot be used here.

  Args:
    path: an address.
    name: of the setting, for the message.
  """
  if (kind := scheme(path)) not in _PACKAGES:
    known = ', '.join(f'{known}://' for known in _PACKAGES)
    raise UserError(f'{name} {path}: addresses of this kind are not read; wanted a path on this '
                    f'machine, or one of {known}')
  module, package = _PACKAGES[kind]
  if importlib.util.find_spec(module) is None:
    raise UserError(f'{name} {path}: needs {module}: pip install "{package}"')
  if not path.partition('://')[2].strip('/'):
    raise UserError(f'{name} {path}: names no bucket; wanted {kind}://BUCKET/FOLDER')


def normal(path: str) -> str:
  """As os.path.normpath: without '.', '..' and doubled slashes."""
  if not is_remote(path):
    return os.path.normpath(path)
  kind, _, place = path.partition('://')
  return f'{kind}://{posixpath.normpath(place)}'


def each(path: str, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
  """As map(function, items); for files of a bucket, which path is in, many items at the same time.
  """
  if not is_remote(path):
    yield from map(function, items)
    return
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    try:
      yield from pool.map(function, items)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def open_file(path: str, mode: str = 'r', encoding: str = 'utf-8',
              newline: str | None = None) -> IO:
  """As open(); a file of a bucket is read whole before this returns.

  Args:
    path: path of the file.
    mode: 'r' or 'rb'.
    encoding, newline: of text.
  """
  if not is_remote(path):
    return open(path, mode, encoding=None if 'b' in mode else encoding, newline=newline)
  data = io.BytesIO(read(path))
  return data if 'b' in mode else io.TextIOWrapper(data, encoding, newline=newline)


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
  """The bytes of a file, or `size` of them from `start` on (fewer at its end)."""
  if is_remote(path):
    if not start and size is None:
      return _patiently(path, lambda fs: fs.cat_file(path))
    if size == 0:
      return b''
    return _patiently(path, lambda fs: _range(fs, path, start, size))
  with open(path, 'rb') as f:
    f.seek(start)
    return f.read(size)


def _range(fs, path, start, size):
  # Others would read megabytes ahead.
  options = {} if fs.async_impl else {'cache_type': 'none'}
  try:
    return fs.cat_file(path, start=start, end=None if size is None else start + size, **options)
  except Exception:
    if start < fs.size(path):
      raise
    return b''  # buckets refuse a range beyond the end of a file


class RangeFile(io.RawIOBase):
  """A file of a bucket that is read by ranges, a request for each read."""

  def __init__(self, path: str):
    super().__init__()
    self._path, self._size, self._at = path, size(path), 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    return self._at

  def readinto(self, buffer) -> int:
    wanted = max(0, min(len(buffer), self._size - self._at))
    found = read(self._path, self._at, wanted)
    buffer[:len(found)] = found
    self._at += len(found)
    return len(found)


def write(path: str, data: bytes) -> None:
  """Writes a file of a bucket: readers see it whole or not at all."""
  _patiently(path, lambda fs: fs.pipe_file(path, data))


def is_file(path: str) -> bool:
  """As os.path.isfile."""
  if not is_remote(path):
    return os.path.isfile(path)
  try:  # fs.isfile would take every failure for a missing file
    return _patiently(path, lambda fs: fs.info(path)['type'] == 'file')
  except (FileNotFoundError, NotADirectoryError):
    return False


def is_dir(path: str) -> bool:
  """As os.path.isdir; a bucket has a folder if it has files in it."""
  if is_remote(path):
    return bool(list_dir(path))
  return os.path.isdir(path)


def exists(path: str) -> bool:
  """As os.path.exists."""
  return is_file(path) or is_dir(path) if is_remote(path) else os.path.exists(path)


def list_dir(path: str) -> list[str]:
  """The names in a folder, in any order; of a bucket [] if there is no such folder."""
  return list(_scan(path)) if is_remote(path) else os.listdir(path)


def scan(path: str) -> dict[str, bool]:
  """The names in a folder of a bucket, by one listing, and whether each is of a file; {} if there
  is no such folder."""
  return {name: kind == 'file' for name, kind in _scan(path).items()}


def _scan(path):
  def names(fs):
    own = fs._strip_protocol(path).rstrip('/')
    try:
      found = {entry['name'].rstrip('/'): entry['type'] for entry in fs.ls(path, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
      return {}
    # A file lists itself; some buckets hold an empty object for the folder.
    return {os.path.basename(name): kind for name, kind in found.items() if name != own}

  return _patiently(path, names)


def size(path: str) -> int:
  """Bytes of a file."""
  if is_remote(path):
    return _patiently(path, lambda fs: fs.size(path))
  return os.path.getsize(path)


def make_dirs(path: str) -> None:
  """Makes a folder and those above it; in a bucket folders come with their files."""
  if not is_remote(path):
    os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
  """Removes a file; in a bucket it may be missing, as after a removal whose answer was lost."""
  if not is_remote(path):
    os.remove(path)
    return
  with contextlib.suppress(FileNotFoundError):
    _patiently(path, lambda fs: fs.rm_file(path))


def upload(local: str, path: str) -> None:
  """Copies a file of this machine into a bucket."""
  _patiently(path, lambda fs: fs.put_file(local, path))


def download(path: str, local: str) -> None:
  """Copies a file of a bucket to this machine."""
  _patiently(path, lambda fs: fs.get_file(path, local))


def walk(path: str) -> list[str]:
  """All files below a folder of a bucket, relative to it, sorted."""
  def names(fs):
    own = fs._strip_protocol(path).rstrip('/') + '/'
    try:
      return sorted(entry.removeprefix(own) for entry in fs.find(path))
    except FileNotFoundError:
      return []

  return [name for name in _patiently(path, names) if not name.endswith('/')]


def entries(path: str) -> dict[str, FileInfo]:
  """All files below a folder of a bucket: {name relative to it: FileInfo}."""
  def found(fs):
    own = fs._strip_protocol(path).rstrip('/') + '/'
    try:
      return {name.removeprefix(own): info for name, info in fs.find(path, detail=True).items()
              if name.startswith(own)}
    except FileNotFoundError:
      return {}

  return {name: FileInfo(info['size'], str(next(filter(None, map(info.get, _VERSIONS)), '')),
                      info.get('crc32c', ''))
          for name, info in sorted(_patiently(path, found).items()) if not name.endswith('/')}


def copy_all(copy: Callable[[str, str], None], pairs: Iterable[tuple[str, str]]) -> None:
  """Copies many files with `upload` or `download`: pairs of (from, to)."""
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    # All have to end before an error is raised: a later start may copy the same files.
    done = [pool.submit(copy, *pair) for pair in pairs]
  for one in done:
    one.result()


def check_bucket(path: str) -> None:
  """Raises UserError if the bucket of an address does not exist, or nobody may look into it."""
  def look(fs):
    with contextlib.suppress(FileNotFoundError):
      return fs.ls(path)
    parts = path.split('/')
    return fs.ls('/'.join(parts[:4 if scheme(path) == 'hf' else 3]))

  try:
    _patiently(path, look)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(f'{path}: there is no such bucket') from error


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
  """Turns errors of other libraries about a bucket into a UserError if the user can fix them.

  For a path on this machine it does nothing.
  """
  try:
    yield
  except Exception as error:
    if is_remote(path) and not isinstance(error, UserError):
      if line := _refusal(path, error):
        raise UserError(line) from error
    raise


def _patiently(path: str, action: Callable[[Any], T]) -> T:
  """The result of an action on the file system of a path, tried again while it does not answer."""
  bucket, pauses, began = '/'.join(path.split('/')[:3]), iter(_PAUSES), None
  while True:
    try:
      found = action(_file_system(scheme(path)))
      _failing_since.pop(bucket, None)
      return found
    except _FINAL:
      _failing_since.pop(bucket, None)
      raise
    except Exception as error:
      if _is_local(error):
        raise
      if line := _refusal(path, error):
        raise AccessRefused(line) from error
      if not _may_pass(error):
        raise
      # Requests that begin during an outage do not wait anew.
      now = time.monotonic()
      began = began or now
      silent = now - _failing_since.setdefault(bucket, now)
      if silent > PATIENCE:
        raise Unreachable(f'{path}: no answer for {PATIENCE:.0f} s ({_reason(error)}); check the '
                          'network and run the same command again') from error
      if now - began > PATIENCE and silent < PATIENCE / 2:
        raise UserError(f'{path}: failed for {PATIENCE:.0f} s ({_reason(error)}), while {bucket} '
                        'answers other requests; check this file') from error
      if bucket not in _reported:
        _reported.add(bucket)
        print(f'{bucket}: no answer ({_reason(error)}); trying again for {PATIENCE:.0f} s',
              file=sys.stderr, flush=True)
    time.sleep(next(pauses, _PAUSES[-1]))


def _is_local(error):
  """Whether an error is of a file on this machine, such as the copy of one in a bucket."""
  return isinstance(error, OSError) and (disk_is_full(error) or os.path.isabs(
      str(error.filename or '')) and os.path.exists(os.path.dirname(str(error.filename))))


def _refusal(path, error):
  """A line on what the user can fix, '' for other errors."""
  code, name = _status(error), type(error).__name__
  if isinstance(error, ImportError):
    module, package = _PACKAGES[scheme(path)]
    return f'{path}: needs {module} ({error}): pip install "{package}"'
  if 'Credential' in name or 'RefreshError' in name or code == 401:
    return f'{path}: no valid credentials ({_reason(error)}); log in, or set them as ' \
           f'{_PACKAGES[scheme(path)][0]} expects them'
  if isinstance(error, PermissionError) or code == 403 or str(error).startswith('Forbidden'):
    return f'{path}: no permission ({_reason(error)}); give this user permission'
  if 'NoSuchBucket' in str(error) or 'RepositoryNotFound' in name:
    return f'{path}: there is no such bucket'
  return ''


def _status(error):
  """The HTTP status of an error of gcsfs, adlfs or huggingface_hub; None if it has none."""
  found = (getattr(error, 'code', None), getattr(error, 'status_code', None),
           getattr(getattr(error, 'response', None), 'status_code', None))
  return next((code for code in found if isinstance(code, int)), None)


def _may_pass(error):
  """Whether an error may be of a network or server that recovers."""
  code = _status(error)
  if code is not None and 400 <= code < 500:
    return code in (408, 429)
  module = type(error).__module__.partition('.')[0]
  return isinstance(error, OSError | TimeoutError) or module in (
      'aiohttp', 'botocore', 'requests', 'urllib3', 'gcsfs', 'google', 'httpx', 'httpx2',
      'httpcore', 'httpcore2', 'huggingface_hub')


def _reason(error):
  lines = str(error).strip().splitlines()
  return lines[0][:160] if lines else type(error).__name__


def _file_system(kind):
  # An instance does not survive a fork.
  return _file_system_of(kind, os.getpid())


@functools.lru_cache(maxsize=16)
def _file_system_of(kind, process):
  del process
  import fsspec
  options = {}
  if kind == 'gs':
    import aiohttp
    # By default gcsfs waits for ever.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # tracebacks of what is tried again
    options['requests_timeout'] = aiohttp.ClientTimeout(sock_connect=30, sock_read=60)
  elif kind == 's3':
    options['config_kwargs'] = {'max_pool_connections': AT_ONCE}
  # Others may write to the bucket: no listing is kept.
  return fsspec.filesystem(kind, use_listings_cache=False, skip_instance_cache=True, **options)
