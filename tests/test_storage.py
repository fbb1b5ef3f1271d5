"""Files in buckets, against emulators of Google's and Amazon's."""

import errno
import os
import time
import types

import botocore.exceptions
import buckets
import gcsfs.retry
import google.auth.exceptions
import pytest

from xmodal import downloads, storage
from xmodal.errors import UserError


@pytest.fixture(scope='module', autouse=True)
def emulators():
  with buckets.emulated():
    yield
  storage._file_system_of.cache_clear()


@pytest.fixture(params=['gs', 's3'])
def root(request):
  return f'{request.param}://{buckets.BUCKET}/storage'


def test_what_is_written_is_read(root):
  path = os.path.join(root, 'a', 'b ü.txt')
  storage.write(path, b'0123456789')
  assert storage.read(path) == b'0123456789'
  assert storage.read(path, 3, 4) == b'3456'
  assert storage.size(path) == 10
  with storage.open_file(path) as f:
    assert f.read() == '0123456789'


def test_folders_are_listed(root):
  for name in ('c/1.txt', 'c/2.txt', 'c/deep/3.txt'):
    storage.write(os.path.join(root, name), b'x')
  assert sorted(storage.list_dir(os.path.join(root, 'c'))) == ['1.txt', '2.txt', 'deep']
  assert storage.walk(os.path.join(root, 'c')) == ['1.txt', '2.txt', 'deep/3.txt']
  assert storage.is_dir(os.path.join(root, 'c')) and storage.is_file(os.path.join(root, 'c/1.txt'))
  assert not storage.is_file(os.path.join(root, 'c'))
  assert not storage.exists(os.path.join(root, 'nothing'))
  assert storage.list_dir(os.path.join(root, 'nothing')) == []


def test_a_missing_file_is_not_waited_for(root):
  with pytest.raises(FileNotFoundError):
    storage.read(os.path.join(root, 'nothing.txt'))


def test_files_are_copied_both_ways(root, tmp_path):
  (tmp_path / 'from').write_bytes(b'content')
  storage.upload(str(tmp_path / 'from'), os.path.join(root, 'copy'))
  storage.download(os.path.join(root, 'copy'), str(tmp_path / 'to'))
  assert (tmp_path / 'to').read_bytes() == b'content'
  storage.remove(os.path.join(root, 'copy'))
  assert not storage.exists(os.path.join(root, 'copy'))


def test_copies_that_nobody_opens_are_deleted(root, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  copies = []
  for name in ('used', 'unused', 'new'):
    storage.write(f'{root}/{name}/file', name.encode())
  for name in ('used', 'unused'):
    copies.append(downloads.copy(f'{root}/{name}'))
    os.utime(copies[-1], (0, 0))
  assert downloads.copy(f'{root}/used') == copies[0]  # marks it as used
  downloads.copy(f'{root}/new')
  assert [os.path.exists(copy) for copy in copies] == [True, False]
  with open(os.path.join(downloads.copy(f'{root}/unused'), 'file'), encoding='utf-8') as f:
    assert f.read() == 'unused'


@pytest.mark.parametrize('kind', ['gs', 's3'])
def test_a_bucket_that_is_not_there_is_named(kind):
  with pytest.raises(UserError, match=f'{kind}://no-such-bucket/file: there is no such bucket'):
    storage.check_bucket(f'{kind}://no-such-bucket/file')


def test_a_failing_look_is_no_missing_file(monkeypatch):
  monkeypatch.setattr(storage, '_PAUSES', (0,))
  monkeypatch.setattr(storage, '_reported', set())
  answers = iter([ConnectionResetError('reset'), {'type': 'file'}, FileNotFoundError()])

  class Failing:

    def info(self, path):
      if isinstance(answer := next(answers), Exception):
        raise answer
      return answer

  monkeypatch.setattr(storage, '_file_system', lambda kind: Failing())
  assert storage.is_file('gs://bucket/file')
  assert not storage.is_file('gs://bucket/file')


def test_no_permission_is_said_at_once(monkeypatch):
  class Closed:

    def cat_file(self, path):
      raise OSError('Forbidden: https://storage.googleapis.com')  # as gcsfs raises a 403

  monkeypatch.setattr(storage, '_file_system', lambda kind: Closed())
  with pytest.raises(UserError, match='gs://bucket/file: no permission'):
    storage.read('gs://bucket/file')


def _of_the_hub(kind, status):
  """An error as huggingface_hub raises it for an answer with a status."""
  errors = pytest.importorskip('huggingface_hub.errors')
  response = types.SimpleNamespace(status_code=status, headers={}, request=None)
  return getattr(errors, kind)(f'{status} Client Error', response=response)


@pytest.mark.parametrize('address, make, line', [
    ('gs://bucket/file', lambda: google.auth.exceptions.DefaultCredentialsError('none found'),
     'no valid credentials'),
    ('gs://bucket/file', lambda: google.auth.exceptions.RefreshError('revoked'),
     'no valid credentials'),
    ('gs://bucket/file', lambda: gcsfs.retry.HttpError({'code': 401, 'message': 'Invalid'}),
     'no valid credentials'),
    ('s3://bucket/file', lambda: botocore.exceptions.NoCredentialsError(), 'no valid credentials'),
    ('s3://bucket/file', lambda: PermissionError('The provided token has expired.'),
     'no permission'),
    ('hf://datasets/owner/name/file', lambda: _of_the_hub('HfHubHTTPError', 401),
     'no valid credentials'),
    ('hf://datasets/owner/name/file', lambda: _of_the_hub('GatedRepoError', 403),
     'no permission')])
def test_refused_credentials_are_one_line_at_once(monkeypatch, address, make, line):
  class Refusing:
    async_impl = True

    def cat_file(self, path):
      raise make()

  monkeypatch.setattr(storage, 'PATIENCE', 1e9)
  monkeypatch.setattr(storage.time, 'sleep', lambda _: pytest.fail('it is tried again'))
  monkeypatch.setattr(storage, '_file_system', lambda kind: Refusing())
  with pytest.raises(storage.AccessRefused, match=f'{address}: {line}') as error:
    storage.read(address)
  assert '\n' not in str(error.value)


def test_a_full_disk_here_is_not_the_buckets(monkeypatch, tmp_path):
  class Full:

    def get_file(self, path, local):
      raise OSError(errno.ENOSPC, 'No space left on device', local)

  monkeypatch.setattr(storage, '_file_system', lambda kind: Full())
  with pytest.raises(OSError, match='No space left') as raised:
    storage.download('gs://bucket/file', str(tmp_path / 'file'))
  assert not isinstance(raised.value, UserError)


def test_a_failing_bucket_is_tried_again_and_said_once(monkeypatch, capsys):
  monkeypatch.setattr(storage, '_PAUSES', (0,))
  monkeypatch.setattr(storage, '_reported', set())
  answers = iter([ConnectionResetError('reset'), TimeoutError(), b'at last'])

  class Failing:

    def cat_file(self, path):
      if isinstance(answer := next(answers), Exception):
        raise answer
      return answer

  monkeypatch.setattr(storage, '_file_system', lambda kind: Failing())
  assert storage.read('gs://bucket/file') == b'at last'
  assert capsys.readouterr().err.count('gs://bucket: no answer (reset)') == 1


def test_a_file_that_goes_on_failing_while_others_are_read_is_the_one_named(monkeypatch):
  monkeypatch.setattr(storage, '_PAUSES', (0,))
  monkeypatch.setattr(storage, 'PATIENCE', 0.2)

  class Partly:

    def cat_file(self, path):
      if 'bad' not in path:
        return b''
      storage.read('gs://bucket/good')  # as another thread may meanwhile
      if time.monotonic() > begun + 30:
        raise SystemExit  # for ever
      raise OSError('500 Internal Server Error')

  monkeypatch.setattr(storage, '_file_system', lambda kind: Partly())
  begun = time.monotonic()
  with pytest.raises(UserError, match='gs://bucket/bad: failed for .* answers other') as error:
    storage.read('gs://bucket/bad')
  assert not isinstance(error.value, storage.Unreachable)  # counted as an unreadable picture


def test_patience_ends(monkeypatch):
  monkeypatch.setattr(storage, '_PAUSES', (0,))
  monkeypatch.setattr(storage, 'PATIENCE', 0.01)

  class Dead:

    def cat_file(self, path):
      raise ConnectionRefusedError('refused')

  monkeypatch.setattr(storage, '_file_system', lambda kind: Dead())
  with pytest.raises(UserError, match=r'no answer for 0 s \(refused\)'):
    storage.read('gs://bucket/file')


@pytest.mark.parametrize('path, words', [
    ('ftp://host/x', 'not read'), ('gs://', 'no bucket'), ('az://box/x', 'pip install "adlfs"')])
def test_addresses_that_cannot_be_used(path, words):
  with pytest.raises(UserError, match=words):
    storage.check(path, '--workdir')


def test_paths_of_this_machine_are_left_alone(tmp_path):
  (tmp_path / 'a').write_text('text')
  assert storage.read(str(tmp_path / 'a'), 1, 2) == b'ex'
  assert storage.list_dir(str(tmp_path)) == ['a']
  assert not storage.is_remote(tmp_path) and not storage.is_remote('C:/x')
