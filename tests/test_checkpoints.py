"""A run that was stopped, killed or damaged ends bit-identical to an uninterrupted one."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import single
import tiny

from xmodal.errors import UserError
from xmodal.tasks.objects import Objects
from xmodal.train import loop
from xmodal.train.checkpoints import checkpoint, reading
from xmodal.train.hooks import log
from xmodal.train.plan import Plan

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def finished(finished_single):
  return finished_single


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run, to change."""
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))


@pytest.fixture(scope='module')
def final(finished):
  return single.restored(finished)


def assert_same(state, final):
  assert jax.tree.structure(state) == jax.tree.structure(final)
  jax.tree.map(np.testing.assert_array_equal, state, final)


def train_steps(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if line['split'] == 'train' and line['task'] == 'all']


def array_files(step_folder, item):
  """The files that hold an item's arrays."""
  files = sorted(file for file in (step_folder / item).rglob('d/*') if file.is_file())
  assert files
  return files


def flip(path, places):
  data = bytearray(path.read_bytes())
  for place in places:
    data[int(place * len(data))] ^= 0x10
  path.write_bytes(data)


def flip_some(files):
  # Not every byte of a file is used, so several are damaged.
  for file in files:
    flip(file, np.arange(0.005, 1, 0.01))


def break_an_array(files):
  # The first byte of a zstd frame; Orbax reports it as a plain Exception. Files
  # that begin otherwise are its index.
  frames = [file for file in files if file.read_bytes()[:4] == b'\x28\xb5\x2f\xfd']
  assert frames
  for file in frames:
    flip(file, [0])


def cut(files):
  for file in files:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def lose_one(files):
  files[0].unlink()  # what the tree of the item begins with


def test_a_run_writes_what_it_promises(finished_tiny):
  assert train_steps(finished_tiny) == [1, 2, 3, 4, 5, 6]
  told = json.loads((finished_tiny / 'final.json').read_text())
  assert told['step'] == 6 and told['evaluation']['vqa']['examples'] == 20
  assert told['unreadable_pictures'] == {'train': [], 'eval': []}
  assert len((finished_tiny / 'predictions_vqa_val.jsonl').read_text().splitlines()) == 20
  for name in ('config.json', 'samples/vqa_val_0000006.png', 'tensorboard', 'checkpoints/6/assets'):
    assert (finished_tiny / name).exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, final):
  """kill -9 while checkpoints of every step are being written."""
  script = '\n'.join((
      'import os, signal, sys, single',
      'from xmodal.train.logs.report import Report',
      'die = lambda: os.kill(os.getpid(), signal.SIGKILL)',
      'Report.advance = lambda self, step, metrics: die() if step == 4 else None',
      'single.train(sys.argv[1], single.changed(train__checkpoint_every=1))'))
  out = subprocess.run(
      [sys.executable, '-c', script, str(tmp_path / 'run')], capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'tests')))})
  assert out.returncode == -9, out.stderr[-2000:]
  assert not (tmp_path / 'run' / 'final.json').exists()
  told = single.train(tmp_path / 'run')
  assert 1 <= told['resumed_from'] <= 5
  assert_same(single.restored(tmp_path / 'run'), final)
  assert train_steps(tmp_path / 'run') == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_moved_aside_and_trained_again(workdir, final, capsys):
  flip_some(array_files(workdir / 'checkpoints' / '6', 'model'))
  told = single.train(workdir)
  line, = (line for line in capsys.readouterr().out.splitlines() if 'is damaged' in line)
  assert f'{workdir}/checkpoints/6 is damaged' in line and f'{workdir}/damaged' in line
  assert told['resumed_from'] == 3 and (workdir / 'damaged' / '6').is_dir()
  assert_same(single.restored(workdir), final)


@pytest.mark.parametrize('item', ['model', 'training'])
@pytest.mark.parametrize('damage', [flip_some, break_an_array, cut, lose_one])
def test_every_damage_is_noticed(workdir, damage, item):
  damage(array_files(workdir / 'checkpoints' / '6', item))
  warnings = []
  assert single.restored(workdir, warnings).step == 3
  line, = warnings
  assert item in line and '\n' not in line
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3']


def test_no_single_bit_on_disk_can_change_a_parameter(workdir, final):
  """A flipped bit is detected, or lies in unread bytes."""
  folder, noticed = workdir / 'checkpoints' / '6', 0
  files = sorted(array_files(folder, 'model'), key=lambda file: -file.stat().st_size)
  for number, file in enumerate(files):
    if number > 1 and noticed:  # Orbax keeps copies and reads only one
      break
    for place in (0.3, 0.7):
      flip(file, [place])
      warnings = []
      state = single.restored(workdir, warnings)
      if warnings:
        noticed += 1
        assert state.step == 3
        os.rename(workdir / 'damaged' / '6', folder)
      else:
        assert_same(state, final)
      flip(file, [place])
  assert noticed


def test_what_came_to_no_checkpoint_is_written_over(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'compile_steps', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    single.train(tmp_path / 'run', single.changed(train__batch_size=16))
  Plan(single.changed(), str(tmp_path / 'run'))  # another config is accepted


def test_a_finished_run_is_only_evaluated(finished_tiny, tmp_path):
  workdir = pathlib.Path(shutil.copytree(finished_tiny, tmp_path / 'run'))
  told = tiny.train(workdir)
  assert told['resumed_from'] == told['step'] == 6
  before = json.loads((finished_tiny / 'final.json').read_text())
  assert before['evaluation']['vqa']['accuracy'] > 0
  assert told['evaluation'] == before['evaluation']
  assert json.loads((workdir / 'final.json').read_text()) == before  # its training time is kept
  one, two = ((folder / 'metrics.jsonl').read_text() for folder in (finished_tiny, workdir))
  assert one == two
  assert_same(tiny.restored(workdir), tiny.restored(finished_tiny))


def test_a_run_with_another_config_is_refused(workdir):
  change = r'another config \(model.cross.mlp_dim=32 there and 24 here\)'
  with pytest.raises(UserError, match=change):
    Plan(single.changed(model__cross__mlp_dim=24), str(workdir))
  Plan(single.changed(train__log_every=5, data__max_bad_share=0.5), str(workdir))


def test_a_checkpoint_of_another_model_is_refused_in_one_line(workdir):
  other = Plan(single.changed(model__vision__mlp_dim=24), str(workdir / 'other'))
  checkpoints = checkpoint.Checkpoints(str(workdir), keep=5)
  words = r'is from another model: .*mlp.* is \(.*32.*\) there'
  with pytest.raises(UserError, match=words) as error:
    checkpoints.restore(other.abstract, pytest.fail)
  assert '\n' not in str(error.value)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3', '6']  # not treated as damaged


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 300 kB."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'none', str(disk)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('this user may not mount')
  yield disk
  subprocess.run(['umount', '--lazy', str(disk)], check=True)


def test_a_full_disk_is_one_line(small_disk):
  """Orbax's threads once printed thousands more."""
  ran = subprocess.run(
      [sys.executable, '-m', 'xmodal.main', '--config', 'tests/tiny.py', '--workdir',
       small_disk / 'run', *single.ARGUMENTS], capture_output=True, text=True, cwd=ROOT)
  assert ran.returncode == 2
  line, = ran.stderr.splitlines()
  assert line.startswith('error: ') and str(small_disk) in line and 'no space left' in line.lower()
  assert checkpoint.saved_steps(str(small_disk / 'run')) == []


def test_only_the_newest_checkpoints_are_kept(workdir, final):
  checkpoints = checkpoint.Checkpoints(str(workdir), keep=2)
  for step in (7, 8):
    checkpoints.save(final.replace(step=np.array(step, np.int32)), str(workdir / 'assets'))
  checkpoints.close()
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['7', '8']


def test_a_checkpoint_is_found_by_workdir_or_step(finished, tmp_path):
  assert checkpoint.find(str(finished)) == str(finished / 'checkpoints' / '6')
  assert checkpoint.find(str(finished / 'checkpoints' / '3')) == str(finished / 'checkpoints' / '3')
  for folder in (tmp_path, tmp_path / 'none'):
    with pytest.raises(UserError, match='no checkpoint in'):
      checkpoint.find(str(folder))


def test_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
  encode = Objects.encode
  monkeypatch.setattr(Objects, 'encode', lambda *args: {
      **encode(*args), 'weight': np.float32(np.nan)})
  monkeypatch.setattr(log, '_MOST_SKIPPED', 5)
  with pytest.raises(UserError, match='not finite for 5 steps in a row, the last at step 5.*'
                                      'learning_rate=0.001'):
    single.train(tmp_path / 'run')
  assert 'step 2: gradients are not finite, step skipped (2 so far)' in capsys.readouterr().out


@pytest.mark.parametrize('shape', [(), (5,), (3, 4, 2)])
def test_an_array_has_one_checksum_whoever_computes_it(shape):
  words = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
  exact = sum(int(word) * (2 * place + 1) for place, word in enumerate(words.flat)) % 2**32
  array = jax.numpy.asarray(words.view(np.float32))
  assert int(reading._weighted_sum(array)) == int(reading._weighted_sum_on_device(array)) == exact
