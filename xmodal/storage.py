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
import os
import sys
import time
from typing import IO, Any, NamedTuple, TypeVar

from xmodal.errors import UserError

# scheme -> (module that fsspec needs, what installs it)
_PACKAGES = {'gs': ('gcsfs', 'xmodal[gcs]'), 's3': ('s3fs', 'xmodal[s3]'),
             'hf': ('huggingface_hub', 'huggingface-hub'), 'az': ('adlfs', 'adlfs')}
PATIENCE = 120.0  # seconds
_PAUSES = (1, 2, 4, 8, 15)  # seconds between attempts; then the last one
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_said: set[str] = set()
_AT_ONCE = 16  # files copied at a time: each waits for the network
# What the listings of fsspec's file systems call the version of a file.
_VERSIONS = ('generation', 'etag', 'ETag', 'blob_id', 'mtime', 'LastModified', 'last_modified')

T = TypeVar('T')


class Entry(NamedTuple):
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
  """Whether a path is in a bucket."""
  return bool(scheme(path))


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


def open_file(path: str, mode: str = 'r', encoding: str = 'utf-8') -> IO:
  """As open(); a file of a bucket is read whole before this returns.

  Args:
    path: path of the file.
    mode: 'r' or 'rb'.
    encoding: of text.
  """
  if not is_remote(path):
    return open(path, mode, encoding=None if 'b' in mode else encoding)
  data = io.BytesIO(read(path))
  return data if 'b' in mode else io.TextIOWrapper(data, encoding)


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
  """The bytes of a file, or `size` of them from `start` on (fewer at its end)."""
  if is_remote(path):
    stop = None if size is None else start + size
    whole = not start and size is None
    return _patiently(path, lambda fs: fs.cat_file(
        path, **{} if whole else {'start': start, 'end': stop}))
  with open(path, 'rb') as f:
    f.seek(start)
    return f.read(size)


def write(path: str, data: bytes) -> None:
  """Writes a file of a bucket: readers see it whole or not at all."""
  _patiently(path, lambda fs: fs.pipe_file(path, data))


def is_file(path: str) -> bool:
  """As os.path.isfile."""
  if is_remote(path):
    return _patiently(path, lambda fs: fs.isfile(path))
  return os.path.isfile(path)


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
  if not is_remote(path):
    return os.listdir(path)

  def names(fs):
    own = fs._strip_protocol(path).rstrip('/')
    try:
      found = [entry.rstrip('/') for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
      return []
    # A file lists itself; some buckets hold an empty object for the folder.
    return [os.path.basename(entry) for entry in found if entry != own]

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
  """Removes a file."""
  if is_remote(path):
    _patiently(path, lambda fs: fs.rm_file(path))
  else:
    os.remove(path)


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


def entries(path: str) -> dict[str, Entry]:
  """All files below a folder of a bucket: {name relative to it: Entry}."""
  def found(fs):
    own = fs._strip_protocol(path).rstrip('/') + '/'
    try:
      return {name.removeprefix(own): info for name, info in fs.find(path, detail=True).items()
              if name.startswith(own)}
    except FileNotFoundError:
      return {}

  return {name: Entry(info['size'], str(next(filter(None, map(info.get, _VERSIONS)), '')),
                      info.get('crc32c', ''))
          for name, info in sorted(_patiently(path, found).items()) if not name.endswith('/')}


def copy_all(copy: Callable[[str, str], None], pairs: Iterable[tuple[str, str]]) -> None:
  """Copies many files with `upload` or `download`: pairs of (from, to)."""
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
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
  began, pauses = time.monotonic(), iter(_PAUSES)
  while True:
    try:
      return action(_file_system(scheme(path)))
    except _FINAL:
      raise
    except Exception as error:
      if line := _refusal(path, error):
        raise UserError(line) from error
      if not _may_pass(error):
        raise
      if time.monotonic() - began > PATIENCE:
        raise UserError(f'{path}: no answer for {PATIENCE:.0f} s ({_reason(error)}); check the '
                        'network and run the same command again') from error
      bucket = '/'.join(path.split('/')[:3])
      if bucket not in _said:
        _said.add(bucket)
        print(f'{bucket}: no answer ({_reason(error)}); trying again for {PATIENCE:.0f} s',
              file=sys.stderr, flush=True)
    time.sleep(next(pauses, _PAUSES[-1]))


def _refusal(path, error):
  """A line on what the user can fix, '' for other errors."""
  code, name = getattr(error, 'code', None), type(error).__name__
  if isinstance(error, ImportError):
    module, package = _PACKAGES[scheme(path)]
    return f'{path}: needs {module} ({error}): pip install "{package}"'
  if 'Credential' in name or 'RefreshError' in name or code == 401:
    return f'{path}: no valid credentials ({_reason(error)}); log in, or set them as ' \
           f'{_PACKAGES[scheme(path)][0]} expects them'
  if isinstance(error, PermissionError) or code == 403 or 'Forbidden' in name:
    return f'{path}: no permission ({_reason(error)}); give this user permission'
  if 'NoSuchBucket' in str(error) or 'RepositoryNotFound' in name:
    return f'{path}: there is no such bucket'
  return ''


def _may_pass(error):
  """Whether an error may be of a network or server that recovers."""
  code = getattr(error, 'code', None)
  if isinstance(code, int) and 400 <= code < 500:
    return code in (408, 429)
  module = type(error).__module__.partition('.')[0]
  return isinstance(error, OSError | TimeoutError) or module in (
      'aiohttp', 'botocore', 'requests', 'urllib3', 'gcsfs', 'google', 'httpx', 'httpcore',
      'huggingface_hub')


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
  # Others may write to the bucket: no listing is kept.
  return fsspec.filesystem(kind, use_listings_cache=False, skip_instance_cache=True)
