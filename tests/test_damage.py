"""Only proven damage counts; a transient fault moves no checkpoint."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xmodal import atomic
from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.train import build
from xmodal.train.checkpoints import checkpoint, reading
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.steps.state import TrainState

ROOT = pathlib.Path(__file__).parents[1]


def state_of(step):
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
      step=zero + step, params={'a': jnp.arange(600.0).reshape(20, 30) + step}, collections={},
      opt_state={'m': jnp.ones(30)}, ema=None, mixer={'x': jnp.ones(1)},
      rng=jnp.zeros(2, jnp.uint32), skipped=zero, skipped_in_a_row=zero)


def abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      state_of(0))


def saved(workdir, steps=(3, 6)):
  """Saves checkpoints of some steps; returns the workdir."""
  (workdir / 'assets').mkdir(parents=True)
  (workdir / 'assets' / 'config.json').write_text('{"a": 1}')
  checkpoints = Checkpoints(str(workdir), keep=5)
  for step in steps:
    checkpoints.save(state_of(step), str(workdir / 'assets'))
  checkpoints.close()
  return workdir


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  return saved(tmp_path_factory.mktemp('saved') / 'run')


@pytest.fixture
def workdir(two_steps, tmp_path, monkeypatch):
  """Checkpoints of steps 3 and 6, to change, with short waits in readers."""
  monkeypatch.setattr(reading, 'PAUSES', (0, 0))
  return shutil.copytree(two_steps, tmp_path / 'run')


def restore(workdir):
  """(the newest readable state, warnings about others)."""
  checkpoints, said = Checkpoints(str(workdir), keep=5), []
  try:
    return checkpoints.restore(abstract(), said.append), said
  finally:
    checkpoints.close()


def files(folder):
  return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None
          for path in sorted(pathlib.Path(folder).rglob('*'))}


def arrays(workdir):
  """The files that hold the newest model; Orbax keeps copies and reads only one."""
  return [path for path in (workdir / 'checkpoints' / '6' / 'model').rglob('d/*')]


def cut(workdir):
  for path in arrays(workdir):
    path.write_bytes(path.read_bytes()[:-7])


def empty(workdir):
  for path in arrays(workdir):
    path.write_bytes(b'')


def zeros(workdir):  # as after a power cut on some file systems
  for path in arrays(workdir):
    path.write_bytes(bytes(path.stat().st_size))


def lose_an_item(workdir):
  shutil.rmtree(workdir / 'checkpoints' / '6' / 'training')


def lose_all(workdir):
  for path in (workdir / 'checkpoints' / '6').iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder_for_file(workdir):
  for path in arrays(workdir):
    path.unlink()
    path.mkdir()


def cut_index(workdir):
  path = workdir / 'checkpoints' / '6' / 'model' / '_METADATA'
  path.write_text(path.read_text()[:40])


def other_name_in_index(workdir):
  """If it were read, the checkpoint would be another model's."""
  path = workdir / 'checkpoints' / '6' / 'model' / '_METADATA'
  path.write_text(path.read_text().replace('params', 'pbrams'))


@pytest.mark.parametrize('damage', [cut, empty, zeros, lose_an_item, lose_all, folder_for_file,
                                    cut_index, other_name_in_index], ids=lambda f: f.__name__)
def test_damage_is_proven_and_told(workdir, damage):
  damage(workdir)
  state, (line,) = restore(workdir)
  assert int(state.step) == 3
  np.testing.assert_array_equal(state.params['a'], state_of(3).params['a'])
  assert 'checkpoints/6 is damaged' in line and '\n' not in line
  assert (workdir / 'damaged' / '6').is_dir()


def links(workdir, target):
  """Replaces files with links; returns a function that restores them."""
  paths = arrays(workdir)
  for path in paths:
    path.rename(path.with_suffix('.aside'))
    path.symlink_to(target(path))

  def mend():
    for path in paths:
      path.with_suffix('.aside').rename(path)
  return mend


def input_output_error(workdir):
  """Makes reads fail with EIO, as on a failing disk, by reading the first page of memory."""
  with open('/proc/self/mem', 'rb') as f:
    try:
      f.read(1)
      pytest.skip('root may map the first page of memory, and some library has')
    except OSError as error:
      assert error.errno == errno.EIO
  return links(workdir, lambda _: '/proc/self/mem')


def endless_links(workdir):
  return links(workdir, lambda path: path.name)


@pytest.mark.skipif(sys.platform != 'linux', reason='makes its faults with /proc')
@pytest.mark.parametrize('fault', [input_output_error, endless_links],
                         ids=lambda f: f.__name__)
def test_a_real_fault_of_the_moment_moves_nothing(workdir, fault):
  checkpoints = Checkpoints(str(workdir), keep=5)
  before = files(workdir)
  with pytest.raises(UserError, match='checkpoints/6 cannot be read') as error:
    mend = fault(workdir)
    try:
      checkpoints.restore(abstract(), pytest.fail)
    finally:
      mend()
  assert '\n' not in str(error.value)
  assert files(workdir) == before
  assert int(checkpoints.restore(abstract(), pytest.fail).step) == 6  # nothing was lost
  checkpoints.close()


ERRORS = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
          OSError(errno.ESTALE, os.strerror(errno.ESTALE)), TimeoutError('timed out'),
          OSError('the server has gone'), ValueError('UNAVAILABLE: connection reset'),
          ValueError('NOT_FOUND: Error opening "zarr" driver'), KeyError('arrays.params'),
          OSError(errno.ESHUTDOWN, 'a number that nobody lists')]


@pytest.mark.parametrize('error', ERRORS, ids=repr)
def test_whatever_the_storage_says_of_whole_files_is_not_damage(workdir, monkeypatch, error):
  def refuse(*args, **kwargs):
    raise error

  for place in ('restore', 'metadata'):
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint.ocp.StandardCheckpointHandler, place, refuse)
      with pytest.raises(UserError, match='cannot be read .*nothing proves that it is damaged'):
        restore(workdir)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3', '6']
  assert not (workdir / 'damaged').exists()


def test_a_fault_that_passes_is_not_noticed(workdir, monkeypatch):
  restore_once, faults = checkpoint.ocp.StandardCheckpointHandler.restore, [1, 1]

  def hesitate(*args, **kwargs):
    if faults:
      faults.pop()
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return restore_once(*args, **kwargs)

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, 'restore', hesitate)
  assert int(restore(workdir)[0].step) == 6 and not faults


def test_a_disk_that_fails_in_a_save_is_one_line(workdir, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  checkpoints = Checkpoints(str(workdir), keep=5)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.damage, 'seal', fail)
    checkpoints.save(state_of(9), str(workdir / 'assets'))
    with pytest.raises(UserError, match='Input/output error.*last complete one is step 6'):
      checkpoints.wait()


def test_a_defect_is_no_fault_of_the_storage(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, 'restore', lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    restore(workdir)


def test_a_checkpoint_without_a_list_is_read_and_never_moved_unproven(workdir):
  """Checkpoints from before file lists were written."""
  for path in (workdir / 'checkpoints').rglob('files.json'):
    path.unlink()
  assert int(restore(workdir)[0].step) == 6
  cut(workdir)
  with pytest.raises(UserError, match='nothing proves .*move that folder away'):
    restore(workdir)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['3', '6']


def test_damaged_ones_are_all_kept(workdir):
  cut(workdir)
  restore(workdir)
  checkpoints = Checkpoints(str(workdir), keep=5)
  checkpoints.save(state_of(6), str(workdir / 'assets'))
  checkpoints.close()
  empty(workdir)
  assert int(restore(workdir)[0].step) == 3
  assert sorted(os.listdir(workdir / 'damaged')) == ['6', '6-2']


def test_with_all_damaged_every_start_stops(finished, tmp_path):
  """It refuses every start: the second one once started over and emptied metrics.jsonl."""
  workdir = pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))
  for step in (3, 6):
    (workdir / 'checkpoints' / str(step) / 'model' / 'manifest.ocdbt').unlink()
  metrics = (workdir / 'metrics.jsonl').read_text()
  for _ in range(3):
    with pytest.raises(UserError, match='no checkpoint in .* can be read: all are in .*damaged.*'
                                        'delete the workdir or give another --workdir'):
      tiny.train(workdir)
    assert (workdir / 'metrics.jsonl').read_text() == metrics
  with pytest.raises(UserError, match='can be read'):
    checkpoint.find(str(workdir))


@pytest.mark.parametrize('name', ['[exp] 1', 'a\\b', 'a**b', 'a*b', '100%', 'a ?', 'two\nlines',
                                  '\u00e4 \u65e5\u672c', '~'])
def test_any_name_of_a_workdir_will_do(tmp_path, name):
  workdir = saved(tmp_path / name / 'run', steps=(3,))
  state, _ = restore(workdir)
  np.testing.assert_array_equal(state.params['a'], state_of(3).params['a'])
  structs = {'params': abstract().params}
  variables = checkpoint.load_variables(checkpoint.find(str(workdir)), structs, ema=False)
  np.testing.assert_array_equal(variables['params']['a'], state_of(3).params['a'])


def test_a_checkpoint_lists_all_its_files(two_steps):
  later = {'files.json', 'commit_success.txt'}  # the list itself, and Orbax's mark of the end
  for item in ('model', 'training', 'assets'):
    folder = two_steps / 'checkpoints' / '6' / item
    listed = json.loads((folder / 'files.json').read_text())
    assert listed.keys() == {str(path.relative_to(folder)) for path in folder.rglob('*')
                             if path.is_file() and path.name not in later}
    for name, (size, _) in listed.items():
      assert (folder / name).stat().st_size == size


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('before')
  with pytest.raises(ZeroDivisionError):
    with atomic.written(str(path)) as f:
      f.write('aft')
      raise ZeroDivisionError
  assert path.read_text() == 'before'
  with atomic.written(str(path)) as f:
    f.write('after')
  assert path.read_text() == 'after' and os.listdir(tmp_path) == ['a.json']


@pytest.mark.parametrize('name', ['config.json', 'tokenizer/tokenizer.json', 'vqa/answers.json',
                                  'objects/names.json', 'tokenizer/tokenizer_config.json'])
def test_a_cut_file_beside_the_parameters_is_one_line(finished, tmp_path, name):
  assets = pathlib.Path(shutil.copytree(finished / 'assets', tmp_path / 'assets'))
  path = assets / name
  whole_text = path.read_bytes()
  for part in (whole_text[:len(whole_text) // 2], b'', bytes(len(whole_text))):
    path.write_bytes(part)
    with pytest.raises(UserError, match='damaged|cannot be read') as error:
      build.load_assets(configs.load(str(assets / 'config.json')), str(assets))
    assert str(assets) in str(error.value) and '\n' not in str(error.value)


def test_several_hosts_agree_on_damage_and_see_that_they_share_no_folder(two_steps, tmp_path):
  """One of two processes finds a truncated shard: both resume from the checkpoint before."""
  for host in '01':
    shutil.copytree(two_steps, tmp_path / host / 'run')
  cut(tmp_path / '1' / 'run')
  slurm = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost',
           'SLURM_NTASKS': '2', 'SLURM_LOCALID': '0', 'JAX_NUM_CPU_DEVICES': '1',
           'PYTHONPATH': os.pathsep.join((str(ROOT), str(ROOT / 'tests')))}
  processes = [
      subprocess.Popen([sys.executable, '-c', HOST, tmp_path / str(host) / 'run', tmp_path / 'one'],
                       text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       env={**os.environ, **slurm, 'SLURM_PROCID': str(host)})
      for host in range(2)]
  outputs = [process.communicate(timeout=200)[0] for process in processes]
  for process, output in zip(processes, outputs):
    assert process.returncode == 0, output[-3000:]
    lines = [line for line in output.splitlines() if line.startswith('>')]
    assert lines[:2] == ['> shared', '> step 3'], output
    assert 'process 1 on' in lines[2] and 'does not see' in lines[2]
    assert 'process 1 on' in lines[3] and 'is damaged (model: ' in lines[3]
  assert os.listdir(tmp_path / 'one') == []


HOST = '''
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
jax.distributed.initialize()
from xmodal.errors import UserError
from xmodal.train.checkpoints import checkpoint, reading
from xmodal.train.process import lock
import test_damage
reading.PAUSES, lock._LOOKS = (0,), 1.0
own, shared = sys.argv[1:]
lock.check_free(shared)
with lock.hold(shared):
  print('> shared', flush=True)
line = ''
try:
  with lock.hold(own):
    pass
except UserError as error:
  line = str(error)
mesh = jax.make_mesh((2,), ('data',))
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), test_damage.abstract())
sharding = NamedSharding(mesh, PartitionSpec('data'))
struct = jax.ShapeDtypeStruct((20, 30), np.float32, sharding=sharding)
abstract = abstract.replace(params={'a': struct})
checkpoints, said = checkpoint.Checkpoints(own, keep=5), []
state = checkpoints.restore(abstract, said.append)
print(f'> step {int(state.step)}', flush=True)
print('>', line, flush=True)
print('>', *said, flush=True)
checkpoints.close()
'''
