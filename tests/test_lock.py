"""One run at a time per workdir, whoever holds it and however that run ended."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import tiny

from xmodal.errors import UserError
from xmodal.train.plan import Plan
from xmodal.train.process import lock

linux = pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')


@pytest.fixture
def other():
  """An idle process, to act as a holder on this machine."""
  process = subprocess.Popen(['sleep', '1000'])
  yield process
  process.kill()
  process.wait()


def written(workdir, **values):
  """Writes the file as a holder does, with some values of another; returns its path."""
  workdir.mkdir(exist_ok=True)
  path = workdir / lock.FILE
  me = lock._Holder('elsewhere', 1, '2026-01-02 03:04:05', lock._machine(), 0, 'theirs')
  path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(me, **values))))
  return path


def by(process):
  return {'pid': process.pid, 'started': lock._start_of(process.pid)}


def contents(workdir):
  return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
          for path in pathlib.Path(workdir).rglob('*')}


@linux
@pytest.mark.parametrize('suspended', [False, True])
def test_the_second_run_says_who_holds_the_workdir_and_changes_nothing(finished, tmp_path, other,
                                                                       suspended):
  workdir = pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))
  written(workdir, **by(other))
  if suspended:  # as by Ctrl-Z
    other.send_signal(signal.SIGSTOP)
  before = contents(workdir)
  said = f'{workdir} is in use: process {other.pid} on elsewhere, since 2026-01-02 03:04:05'
  for mode in ('train', 'eval'):
    with pytest.raises(UserError, match=said) as error:
      Plan(tiny.get_config(), str(workdir), mode)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match=said), lock.hold(str(workdir)):
    pass
  assert contents(workdir) == before
  Plan(tiny.get_config(), str(workdir), 'dry_run')  # writes nothing


@linux
def test_after_kill_9_the_next_goes_on_at_once(tmp_path, other, monkeypatch):
  monkeypatch.setattr(lock, '_wait_for_beat', lambda *_: pytest.fail('it waits'))
  path = written(tmp_path / 'run', **by(other))
  other.kill()  # a zombie until it is waited for
  os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
  with lock.hold(str(tmp_path / 'run')):
    assert json.loads(path.read_text())['pid'] == os.getpid()
  assert os.listdir(tmp_path / 'run') == []


@linux
def test_another_process_with_the_same_number_is_no_holder(tmp_path, other):
  written(tmp_path / 'run', pid=other.pid, started=lock._start_of(other.pid) - 1)
  with lock.hold(str(tmp_path / 'run')):
    pass


@pytest.mark.parametrize('text', [None, '', '{"host": "a'], ids=['whole', 'empty', 'cut'])
def test_a_holder_elsewhere_is_known_by_its_beats(tmp_path, monkeypatch, capsys, text):
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'LIMIT', 0.3)
  path = written(tmp_path / 'run', machine='another boot')
  if text is not None:
    path.write_text(text)
  ended = threading.Event()

  def beat():
    while not ended.wait(0.05):
      os.utime(path)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(UserError, match='is in use'), lock.hold(str(tmp_path / 'run')):
      pass
  finally:
    ended.set()
    thread.join()
  with lock.hold(str(tmp_path / 'run')):  # it beats no more
    assert json.loads(path.read_text())['pid'] == os.getpid()
  assert 'may still be running; watching it for up to' in capsys.readouterr().err
  assert os.listdir(tmp_path / 'run') == []


def test_a_holder_of_long_ago_is_not_waited_for(tmp_path, monkeypatch):
  path = written(tmp_path / 'run', machine='another boot')
  os.utime(path, (1e9, 1e9))
  with lock.hold(str(tmp_path / 'run')):
    pass


@pytest.mark.parametrize('way_out', [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_every_way_out_lets_go(tmp_path, way_out):
  with pytest.raises(way_out), lock.hold(str(tmp_path / 'run')):
    assert os.listdir(tmp_path / 'run') == [lock.FILE]
    raise way_out
  assert os.listdir(tmp_path / 'run') == []


def test_of_two_that_come_to_a_dead_holder_one_gets_it(tmp_path, monkeypatch):
  """The slower process must not remove the file of the quicker one."""
  path = written(tmp_path / 'run', machine='another boot')
  gone, _ = lock._read(path)
  quicker = written(tmp_path / 'run', token='of the quicker one').read_text()
  lock._remove(str(path), gone)
  assert path.read_text() == quicker and os.listdir(tmp_path / 'run') == [lock.FILE]


def test_who_lost_the_workdir_while_suspended_ends(tmp_path):
  script = '\n'.join((
      'import sys, time', 'from xmodal.train.process import lock', 'lock.BEAT = 0.05',
      'with lock.hold(sys.argv[1]):', '  print("held", flush=True)', '  time.sleep(60)'))
  with subprocess.Popen([sys.executable, '-c', script, tmp_path / 'run'], text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        cwd=pathlib.Path(__file__).parents[1]) as process:
    assert process.stdout.readline() == 'held\n'
    path = tmp_path / 'run' / lock.FILE
    (tmp_path / 'new').write_text(json.dumps(dataclasses.asdict(
        lock._Holder('elsewhere', 7, 'now', '', 0, 'theirs'))))
    os.replace(tmp_path / 'new', path)
    assert process.wait(timeout=60) == 2
    assert 'process 7 on elsewhere, since now, has taken over this workdir' in process.stderr.read()
  assert json.loads(path.read_text())['token'] == 'theirs'
