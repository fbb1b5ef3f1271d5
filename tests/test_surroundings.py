"""Environments: closed streams, users without a home, full disks and devices, odd paths."""

import errno
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from xmodal import augment, errors, export, paths, predict
from xmodal.bench import multitask
from xmodal.data import check
from xmodal.data.open import open_source
from xmodal.data.tokenizer import load_tokenizer
from xmodal.errors import UserError
from xmodal.pretrained.__main__ import main as pretrained
from xmodal.pretrained.hub import find_folder
from xmodal.train.checkpoints import checkpoint
from xmodal.train.plan import Plan
from xmodal.train.process.compilation_cache import enable_compilation_cache

ROOT = pathlib.Path(__file__).parents[1]
ADDRESSES = ['gs://bucket/a', 's3://bucket/a', 'hf://user/a', 'https://x.org/a', 'gs:/bucket/a',
             'file:///a']


# Addresses


@pytest.mark.parametrize('address', ADDRESSES)
def test_an_address_is_no_folder(address):
  with pytest.raises(UserError, match='--workdir .*: has to be on this machine'):
    paths.local(address, '--workdir')


@pytest.mark.parametrize('path', ['a', './gs:/a', '/a:b/c', 'C:/a', 'a b', '~x:/y'])
def test_other_paths_are_of_this_machine(path):
  assert paths.local(path, 'it') == os.path.abspath(path)


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert paths.local('~/runs/a', '--workdir') == '/home/me/runs/a'


ADDRESS = 'ftp://host/a'
REFUSED = 'has to be on this machine|addresses of this kind are not read'
FILE = __file__


@pytest.mark.parametrize('run', [
    lambda: Plan(tiny.get_config(), ADDRESS),
    lambda: Plan(tiny.changed(data__source='jsonl', data__root=ADDRESS), 'runs/none'),
    lambda: Plan(tiny.changed(model__vision__pretrained=ADDRESS), 'runs/none'),
    lambda: Plan(tiny.changed(model__text__pretrained=ADDRESS), 'runs/none'),
    lambda: open_source(tiny.changed(data__more=(ADDRESS,)), 'train', train=True),
    lambda: load_tokenizer(ADDRESS), lambda: find_folder(ADDRESS),
    lambda: checkpoint.find(ADDRESS),
], ids=['workdir', 'root', 'vision', 'text', 'more', 'tokenizer', 'hub', 'checkpoint'])
def test_no_part_takes_an_address_for_a_folder(run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f'{ADDRESS}.*: ({REFUSED})'):
    run()
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('command, arguments', [
    (predict.main, ['--checkpoint', ADDRESS, '--image', FILE]),
    (predict.main, ['--checkpoint', ROOT, '--image', ADDRESS]),
    (predict.main, ['--checkpoint', ROOT, '--image', FILE, '--output', f'{ADDRESS}.png']),
    (predict.main, ['--checkpoint', ROOT, '--image', FILE, '--mask', ADDRESS]),
    (augment.main, ['--checkpoint', ADDRESS, '--images', ROOT, '--output', 'o', '--captions']),
    (augment.main, ['--checkpoint', ROOT, '--images', ADDRESS, '--output', 'o', '--captions']),
    (augment.main, ['--checkpoint', ROOT, '--images', ROOT, '--output', ADDRESS, '--captions']),
    (augment.main, ['--checkpoint', ROOT, '--images', ROOT, '--output', 'o', '--questions',
                    ADDRESS]),
    (check.main, [ADDRESS]), (check.main, [ADDRESS, '--source', 'coco']),
    (export.main, ['--checkpoint', ADDRESS, '--part', 'text', '--output', 'o']),
    (export.main, ['--checkpoint', ROOT, '--part', 'text', '--output', ADDRESS]),
    (pretrained, ['show', ADDRESS]), (multitask.main, ['--workdir', ADDRESS]),
], ids=lambda value: ' '.join(map(str, value[:1])) if isinstance(value, list) else value.__module__)
def test_no_command_takes_an_address_for_a_folder(command, arguments, tmp_path, monkeypatch,
                                                  capsys):
  monkeypatch.chdir(tmp_path)
  assert command([str(argument) for argument in arguments]) == 2
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and re.search(REFUSED, line)
  assert os.listdir(tmp_path) == []


# Meanings of errors


def test_an_error_that_the_user_can_fix_is_one_line(tmp_path):
  for name in ('absent', 'two\nlines'):
    with pytest.raises(OSError) as error:
      open(tmp_path / name / 'file')
    line = errors.one_line(error.value, 'here')
    assert str(tmp_path / name / 'file') in line and 'No such file' in line
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # write errors name no file
  assert errors.one_line(full, '/my/run').startswith('/my/run: No space left on device')


@pytest.mark.parametrize('error', [
    OSError('without a number'),
    ConnectionResetError(errno.ECONNRESET, 'reset'), OSError(errno.EINVAL, 'Invalid', '/a'),
    FileNotFoundError(errno.ENOENT, 'No such file', str(ROOT / 'xmodal' / 'table.json')),
    FileNotFoundError(errno.ENOENT, 'No such file'), ValueError('quota exceeded'),
], ids=repr)
def test_others_keep_their_traceback(error):
  assert errors.one_line(error, '/my/run') == ''


def test_a_device_without_memory_is_no_full_disk():
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jnp.zeros((2**46,)).block_until_ready()
  assert 'RESOURCE_EXHAUSTED' in str(error.value)
  line = errors.one_line(error.value, '/my/run')
  assert 'no memory left on the device' in line and 'config.train.batch_size' in line
  assert not errors.disk_is_full(error.value)


def test_a_full_disk_is_known_by_the_words_of_the_system():
  for number in (errno.ENOSPC, errno.EDQUOT):
    assert errors.disk_is_full(OSError(number, os.strerror(number)))
    assert errors.disk_is_full(ValueError(f'UNKNOWN: writing "a": {os.strerror(number)}'))
    try:
      try:
        raise OSError(number, os.strerror(number))
      except OSError as cause:
        raise RuntimeError('the writer failed') from cause
    except RuntimeError as wrapped:
      assert errors.disk_is_full(wrapped)
  assert not errors.disk_is_full(ValueError('RESOURCE_EXHAUSTED: quota of requests'))


def test_a_disk_that_fails_is_one_line():
  for number in (errno.EIO, errno.ESTALE):
    text = os.strerror(number)
    assert errors.one_line(OSError(number, text, '/data/a'), '/my/run').startswith(
        f'/data/a: {text}')
    assert errors.disk_failure(ValueError(f'UNKNOWN: writing "a": {text}')) == text
  assert not errors.disk_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


# Streams and home


def run(arguments, redirection='', **more):
  """Runs a module in a shell with some streams closed: (exit code, stdout, stderr)."""
  command = ' '.join([sys.executable, '-m', *map(str, arguments), redirection])
  done = subprocess.run(command, shell=True, capture_output=True, text=True, **{
      'cwd': ROOT, 'env': {**os.environ, 'PYTHONPATH': str(ROOT)}, **more})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('redirection', ['2>&-', '>&- 2>&-', '<&- >&- 2>&-'])
@pytest.mark.parametrize('arguments', [
    ('xmodal.data.check', '/nowhere'), ('xmodal.main', '--config', '/nowhere.py')],
    ids=lambda a: a[0])
def test_closed_streams_change_no_exit_code(arguments, redirection):
  assert run(arguments, redirection) == (2, '', '')


def test_nothing_that_is_printed_lands_in_a_file_when_stderr_is_closed(tmp_path):
  """The next opened file would get the file descriptor of stderr."""
  script = tmp_path / 'program.py'
  script.write_text('\n'.join((
      'import os, sys', 'from xmodal import errors', 'errors.prepare_environment()',
      'with open(sys.argv[1], "w") as f:', '  os.write(2, b"of a library")',
      '  print("told", file=sys.stderr)', '  f.write("data")')))
  done = subprocess.run(f'{sys.executable} {script} {tmp_path / "file"} 2>&- >&-', shell=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0 and (tmp_path / 'file').read_text() == 'data'


@pytest.mark.parametrize('home', [None, '/proc/none', 'relative'])
def test_without_a_home_there_is_no_cache_and_no_folder_of_that_name(tmp_path, monkeypatch, home):
  monkeypatch.chdir(tmp_path)
  for name in ('XDG_CACHE_HOME', 'HOME'):
    monkeypatch.setenv(name, '')  # restored in any case
    monkeypatch.delenv(name)
  if home is not None:
    monkeypatch.setenv('HOME', home)
  # As for a user that is not in the password database.
  monkeypatch.setattr('pwd.getpwuid', lambda _: {}['nobody'])
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None and os.listdir(tmp_path) == []
    if home is None:
      for action in (lambda: find_folder('user/name'), lambda: paths.local('~/a', '--workdir')):
        with pytest.raises(UserError, match='no home folder'):
          action()
    errors.prepare_environment()  # so that libraries such as Keras do not create one
    assert os.path.isabs(os.path.expanduser('~')) and os.listdir(tmp_path) == []
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


def test_a_program_that_was_cut_in_the_cache_is_compiled_and_kept_again(tmp_path):
  script = '\n'.join((
      'import pathlib, sys', 'import jax',
      'from xmodal.train.process.compilation_cache import enable_compilation_cache',
      'enable_compilation_cache()',
      'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)',
      'double = jax.jit(lambda x: x + x)', 'assert double(2) == 4',
      'entry, = pathlib.Path(sys.argv[1]).glob("*lambda*-cache")', 'kept = entry.read_bytes()',
      'entry.write_bytes(kept[:-20])',
      'jax.clear_caches()', 'assert double(3) == 6',
      'assert entry.stat().st_size > len(kept) - 20',
      'jax.clear_caches()', 'assert double(4) == 8'))  # without another message
  done = subprocess.run(
      [sys.executable, '-c', script, tmp_path], capture_output=True, text=True, cwd=ROOT,
      env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path), 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  line, = done.stderr.splitlines()
  assert str(tmp_path) in line and 'was truncated and is compiled again' in line


# Threads

COUNT_THREADS = """
import os
from xmodal import main
import jax
main.give_threads(split={split})
devices = len(jax.devices())
names = [open(f'/proc/self/task/{task}/comm').read().strip()
         for task in os.listdir('/proc/self/task')]
print(devices, names.count('tf_XLAEigen'))
"""


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='threads are counted in /proc')
@pytest.mark.parametrize('variables, split, wanted', [
    ({'NPROC': '1', 'JAX_NUM_CPU_DEVICES': '4'}, False, '4 4'),
    ({'NPROC': '1', 'JAX_NUM_CPU_DEVICES': '4'}, True, '4 8'),
    ({'NPROC': '7', 'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, False, '4 7')])
def test_xla_has_a_thread_for_each_device(variables, split, wanted):
  """Counts the system's threads: with fewer than devices, a collective may hang."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', **variables}
  program = COUNT_THREADS.replace('{split}', str(split))
  ended = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment,
                         capture_output=True, text=True, check=True)
  assert ended.stdout.split() == wanted.split()
