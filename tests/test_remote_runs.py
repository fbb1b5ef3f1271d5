"""Runs in buckets: a run that goes on elsewhere ends like one on this machine."""

import json
import os
import shutil
import threading

import buckets
import jax
import numpy as np
from PIL import Image
import pytest
import single
import tiny

from xmodal import export, predict, storage
from xmodal.errors import UserError
from xmodal.pretrained.hub import find_folder
from xmodal.train import run as runs
from xmodal.train.checkpoints import bucket, checkpoint
from xmodal.train.logs import speed
from xmodal.train.plan import Plan
from xmodal.train.process import lock
from xmodal.train.process.mirror import RunFolder
from xmodal.train.process.stop import Stop
from xmodal.train.steps import state as states


@pytest.fixture(scope='module')
def finished(finished_single):
  return finished_single


@pytest.fixture(scope='module', autouse=True)
def emulators(tmp_path_factory):
  """Emulated buckets, and a cache of this module's own."""
  with buckets.emulated(), pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    patch.setattr(lock, '_SETTLE', 0.05)
    yield
  storage._file_system_of.cache_clear()


def forget_this_machine():
  """As if the run went on on another machine."""
  shutil.rmtree(os.path.join(os.environ['XDG_CACHE_HOME'], 'xmodal'), ignore_errors=True)


def assert_same(state, final):
  assert jax.tree.structure(state) == jax.tree.structure(final)
  jax.tree.map(np.testing.assert_array_equal, state, final)


def lines_of(text):
  """Lines of metrics.jsonl without measured times."""
  lines = [json.loads(line) for line in text.splitlines()]
  return [{key: value for key, value in line.items()
           if key not in speed.NAMES} for line in lines]


def arrays(address):
  """The state of the newest checkpoint."""
  if storage.scheme(address) == 'gs':
    return single.restored(address)
  folder = RunFolder(address)
  folder.fetch()
  checkpoints = checkpoint.Checkpoints(address, 5, local=folder.local)
  state = checkpoints.restore(single.abstract(), pytest.fail)
  checkpoints.close()
  return jax.device_get(state)


def interrupted_run(kind):
  """The address of a run that was stopped after step 4 and went on on another machine."""
  address = f'{kind}://{buckets.BUCKET}/runs/tiny'
  with pytest.MonkeyPatch.context() as patch:
    places = []
    patch.setattr(Stop, 'reached', lambda self: places.append(1) or len(places) == 4)
    assert single.train(address) == {}
  assert sorted(checkpoint.saved_steps(address)) == [3, 4]
  assert not storage.exists(f'{address}/running.json')
  forget_this_machine()
  assert single.train(address)['resumed_from'] == 4
  return address


@pytest.fixture(scope='module')
def in_gs(emulators):
  return interrupted_run('gs')


@pytest.fixture(scope='module')
def in_s3(emulators):
  return interrupted_run('s3')


@pytest.fixture(params=['gs', 's3'], scope='module')
def address(request):
  return request.getfixturevalue(f'in_{request.param}')


def test_it_ends_bit_for_bit_like_a_run_on_this_machine(address, finished):
  assert sorted(checkpoint.saved_steps(address)) == [4, 6]
  assert_same(arrays(address), single.restored(finished))
  assert lines_of(storage.read(f'{address}/metrics.jsonl').decode()) == lines_of(
      (finished / 'metrics.jsonl').read_text())
  final = json.loads(storage.read(f'{address}/final.json'))
  assert final['evaluation'] == json.loads((finished / 'final.json').read_text())['evaluation']


def test_the_bucket_holds_what_a_folder_holds(address, finished):
  def small(names):
    return {name for name in names
            if not name.startswith(('checkpoints/', 'tensorboard/')) and name != 'left_out.json'}

  there = storage.walk(address)
  here = [str(path.relative_to(finished)) for path in finished.rglob('*') if path.is_file()]
  assert small(there) == small(here)
  assert len([name for name in there if name.startswith('tensorboard/')]) == 1
  for name in ('_CHECKPOINT_METADATA', 'model/files.json', 'training/files.json',
               'assets/files.json', 'assets/config.json'):
    assert f'checkpoints/6/{name}' in there


def upload(run, kind):
  """Copies the last checkpoint of a run into a bucket; returns the run's address there."""
  address = f'{kind}://{buckets.BUCKET}/runs/uploaded'
  for path in filter(os.path.isfile, (run / 'checkpoints/6').rglob('*')):
    storage.upload(str(path), f'{address}/{path.relative_to(run)}')
  storage.write(f'{address}/checkpoints/6/{bucket.COMPLETE}', b'complete')
  return address


@pytest.mark.parametrize('kind', ['gs', 's3'])
def test_eval_gives_the_scores_of_the_training(kind, finished_tiny):
  address = upload(finished_tiny, kind)
  forget_this_machine()
  scores = runs.evaluate_newest(Plan(tiny.get_config(), address, 'eval'))
  assert scores['vqa']['accuracy'] > 0
  assert scores == json.loads((finished_tiny / 'final.json').read_text())['evaluation']


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / 'a.png'
  Image.new('RGB', (32, 32), 'red').save(path)
  return str(path)


ROOT = f'gs://{buckets.BUCKET}'


def test_predict_answers_from_the_bucket_into_the_bucket(in_gs, finished, picture, capsys):
  forget_this_machine()
  output = f'{ROOT}/{os.path.basename(os.path.dirname(picture))}/answers.jsonl'
  for checkpoint_, out in ((in_gs, output), (str(finished), picture + '.jsonl')):
    assert predict.main(['--checkpoint', checkpoint_, '--image', os.path.dirname(picture),
                         '--task', 'objects', '--output', out]) == 0
  assert storage.read(output) == storage.read(picture + '.jsonl')
  capsys.readouterr()
  assert predict.main(['--checkpoint', in_gs, '--image', os.path.dirname(picture), '--task',
                       'objects', '--output', output]) == 2
  assert f'--output {output} is there already' in capsys.readouterr().err


def test_predict_reads_pictures_and_questions_of_a_bucket(finished, tmp_path, capsys):
  for place in ('', 'below'):
    (tmp_path / place).mkdir(exist_ok=True)
    Image.new('RGB', (32, 32), 'blue').save(tmp_path / place / 'b.png')
  (tmp_path / 'asked.jsonl').write_text('{"image": "b.png"}\n{"image": "below/b.png"}\n')
  there = f'{ROOT}/to_predict'
  for path in tmp_path.rglob('*.*'):
    storage.upload(str(path), f'{there}/{path.relative_to(tmp_path)}')

  def answers(*arguments):
    capsys.readouterr()
    assert predict.main(['--checkpoint', str(finished), '--task', 'objects', *arguments]) == 0
    return capsys.readouterr().out

  for flag, name in (('--image', ''), ('--image', '/b.png'), ('--input', '/asked.jsonl')):
    assert answers(flag, there + name) == answers(flag, str(tmp_path) + name) != ''
  addressed = tmp_path / 'addressed.jsonl'
  addressed.write_text(json.dumps({'image': f'{there}/b.png'}))
  assert '"error"' not in answers('--input', str(addressed))
  assert predict.main(['--checkpoint', str(finished), '--image', f'{there}/none.png']) == 2
  assert f'--image {there}/none.png: no such file' in capsys.readouterr().err


def test_export_writes_the_tower_into_the_bucket(emulators, finished_tiny, tmp_path, capsys):
  run = upload(finished_tiny, 'gs')
  for checkpoint_, out in ((run, f'{ROOT}/tower'), (str(finished_tiny), str(tmp_path / 'tower'))):
    assert export.main(['--checkpoint', checkpoint_, '--part', 'text', '--output', out]) == 0
  for path in (tmp_path / 'tower').iterdir():
    assert storage.read(f'{ROOT}/tower/{path.name}') == path.read_bytes()
  assert export.main(['--checkpoint', run, '--part', 'text', '--output', f'{ROOT}/tower']) == 2
  assert 'already exists' in capsys.readouterr().err
  plan = Plan(single.changed(model__text__pretrained=f'{ROOT}/tower'), str(tmp_path / 'run'))
  assert any('text tower from' in note and 'tensors loaded' in note for note in plan.notes)


def test_a_run_starts_from_one_in_the_bucket(in_gs, finished, tmp_path):
  def start(folder):
    plan = Plan(single.changed(train__start_from=folder), str(tmp_path / 'run'))
    return jax.device_get(plan.loader.fill(states.create(plan.init, plan.abstract)).params)

  jax.tree.map(np.testing.assert_array_equal, start(in_gs), start(str(finished)))


def test_the_best_checkpoint_is_found(in_gs):
  storage.write(f'{in_gs}/best.json', b'{"step": 4}')
  assert checkpoint.find(f'{in_gs}/best') == f'{in_gs}/checkpoints/4'
  storage.remove(f'{in_gs}/best.json')


def test_the_second_run_is_refused_and_changes_nothing(address, monkeypatch):
  other = lock._Holder('elsewhere', 7, '2026-01-02', 'another boot', 0, 'theirs')
  path = f'{address}/running.json'
  before = storage.entries(address)
  with lock.hold(address):
    with pytest.raises(UserError, match=f'{address} is in use: process {os.getpid()} on'):
      Plan(single.changed(), address)
    Plan(single.changed(), address, 'dry_run')
  assert storage.entries(address) == before
  monkeypatch.setattr(lock, 'BEAT', 0.05)
  monkeypatch.setattr(lock, 'LIMIT', 2.0)
  ended = threading.Event()

  def beat():
    while not ended.wait(0.05):
      lock._touch(path, other)

  lock._touch(path, other)
  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(UserError, match='is in use: process 7 on elsewhere'), lock.hold(address):
      pass
  finally:
    ended.set()
    thread.join()
  with lock.hold(address):  # it beats no more
    assert json.loads(storage.read(path))['pid'] == os.getpid()
  assert storage.entries(address) == before


def test_of_two_that_write_the_lock_the_last_one_holds_it(address, monkeypatch):
  other = lock._Holder('elsewhere', 7, '2026-01-02', lock._machine(), 0, 'theirs')
  path = f'{address}/running.json'
  monkeypatch.setattr(lock, '_runs', lambda holder: True)
  monkeypatch.setattr(lock.time, 'sleep', lambda _: lock._touch(path, other))
  with pytest.raises(UserError, match='is in use: process 7'), lock.hold(address):
    pass
  storage.remove(path)


def test_a_damaged_checkpoint_is_marked_and_trained_again(address, finished, capsys):
  step = f'{address}/checkpoints/6'
  _, name = max((entry.size, name) for name, entry in storage.entries(f'{step}/model').items()
                if name.startswith('d/'))
  storage.write(f'{step}/model/{name}', storage.read(f'{step}/model/{name}')[:-7])
  forget_this_machine()
  assert single.train(address)['resumed_from'] == 4
  line, = (line for line in capsys.readouterr().out.splitlines() if 'is damaged' in line)
  assert f'checkpoint {step} is damaged (model: ' in line and 'marked by damaged.txt' in line
  assert_same(arrays(address), single.restored(finished))


def test_with_all_damaged_every_start_stops(address):
  steps = [f'{address}/checkpoints/{step}' for step in (4, 6)]
  for step in steps:
    bucket.set_aside(step, 'because')
  with pytest.raises(UserError, match=f'no checkpoint in {address} can be read: all have damaged'):
    Plan(single.changed(), address)
  for step in steps:  # for the tests after this one
    storage.remove(f'{step}/{bucket.DAMAGED}')
    storage.write(f'{step}/{bucket.COMPLETE}', b'complete')


# Addresses that no run can use


@pytest.mark.parametrize('workdir, words', [
    ('gs://no-such-bucket/run', 'there is no such bucket'),
    ('s3://no-such-bucket/run', 'there is no such bucket'),
    ('hf://me/model/run', 'too slow for a run; wanted gs://'),
    ('gs://bucket/run[1]', r'cannot contain \['),
    ('ftp://host/run', 'are not read')])
def test_a_workdir_that_cannot_be_used_is_one_line(workdir, words):
  with pytest.raises(UserError, match=f'--workdir .*{words}') as error:
    Plan(single.changed(), workdir)
  assert '\n' not in str(error.value)


def test_several_processes_want_gs_or_a_shared_folder(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match='several can write their checkpoints to gs:// or to a fold'):
    RunFolder('s3://bucket/run')
  RunFolder('gs://bucket/run')


@pytest.mark.parametrize('name', ['gs://bucket/none', 'gs://no-such-bucket/run', 's3://bucket/none',
                                  's3://no-such-bucket/run'])
def test_a_checkpoint_that_is_not_there_is_one_line(name):
  wanted = 'there is no such bucket' if 'no-such' in name else 'no checkpoint in'
  with pytest.raises(UserError, match=wanted):
    checkpoint.find(name)
  with pytest.raises(UserError, match='no such'):
    find_folder(name)
