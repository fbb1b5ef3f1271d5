"""Three tasks from two sources in one run."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from test_sharding import three_steps
import tiny

from xmodal import predict
from xmodal.data.example import Example
from xmodal.errors import UserError
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.plan import Plan


def mixed(tasks=('vqa', 'objects', 'detection'), **values):
  """Detection has its own source: fewer, crowded scenes, at their aspect ratio."""
  c = tiny.changed(mixer__tasks=tasks, mixer__weights=(1.0,) * len(tasks), **values)
  for task in set(tasks) - {'vqa', 'objects'} or tasks[-1:]:
    c.mixer.data[task].crowded = True
    c.mixer.data[task].keep_aspect = True
    c.mixer.data[task].train_examples = 24
    c.mixer.data[task].eval_examples = 12
  return c


def in_turns(**values):
  return mixed(mixer__sampling='proportional', mixer__balance='famo', mixer__measure_every=4,
               seed=5, train__log_every=3, **values)


@functools.cache
def planned():
  """The Plan of such a run."""
  return Plan(in_turns(), 'unused')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of six single-task steps, and the contents of final.json."""
  workdir = tmp_path_factory.mktemp('mixed') / 'run'
  return workdir, tiny.train(workdir, in_turns())


def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path):
  workdir, _ = run
  stopped = shutil.copytree(workdir, tmp_path / 'run')
  shutil.rmtree(stopped / 'checkpoints' / '6')
  assert tiny.train(stopped, in_turns())['resumed_from'] == 3
  a, b = (restored(folder) for folder in (workdir, stopped))
  assert a.step == b.step == 6
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert a.mixer['seen'].sum() == 6  # every step trained one task


def restored(workdir):
  """The state of a workdir's newest checkpoint."""
  checkpoints = Checkpoints(str(workdir), keep=5)
  state = checkpoints.restore(planned().abstract, pytest.fail)
  checkpoints.close()
  return jax.device_get(state)


def test_each_task_is_scored_on_its_own_source(run):
  workdir, final = run
  scores = final['evaluation']
  assert (scores['vqa']['examples'], scores['detection']['examples']) == (20, 12)
  assert scores['detection']['referring_examples'] == 12  # only crowded scenes have texts
  assert len((workdir / 'predictions_vqa_val.jsonl').read_text().splitlines()) == 20
  for task in ('vqa', 'objects', 'detection'):
    assert (workdir / 'samples' / f'{task}_val_0000006.png').exists()
  assert final['unreadable_pictures'].keys() == {
      f'{use} data of {tasks}' for use in ('train', 'eval')
      for tasks in ('vqa and objects', 'detection')}


def test_losses_weights_shares_and_cosines_are_written_down(run):
  workdir, sampling = run[0], planned().sampling
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  told = {}
  for line in lines:
    if line['split'] == 'train':
      told.setdefault(line['step'], {})[line['task']] = line
  assert told.keys() == {3, 6}
  assert {f'cosine_{pair}' for pair in ('vqa_objects', 'vqa_detection', 'objects_detection')} <= (
      told[6]['all'].keys())
  for task in ('vqa', 'objects', 'detection'):
    assert told[6][task]['gradient_norm'] > 0
    assert {'share'} <= told[6][task].keys()
  assert sum(told[6][task]['share'] for task in ('vqa', 'objects', 'detection')) == pytest.approx(1)
  # A line has the last metrics of the tasks trained since the previous line.
  for step, line in told.items():
    trained = {task for task in ('vqa', 'objects', 'detection')
               if sampling.count_steps((task,), step) > sampling.count_steps((task,), step - 3)}
    assert trained == {task for task in line if 'loss' in line[task] and task != 'all'}
    assert all('weight' in line[task] for task in trained)


def test_predict_fits_pictures_as_the_source_of_the_task_does(run):
  predictor = predict.Predictor(str(run[0]))
  wide = Example(np.full((16, 32, 3), 200, np.uint8), question='what?')
  squashed = predictor.batch([wide], {'vqa': predictor.task('vqa')})
  kept = predictor.batch([wide], {'detection': predictor.task('detection')})
  assert 'extent' not in squashed and kept['extent'].tolist() == [[16, 32]]
  assert len(predictor([wide], 'vqa')[1]) == 1


def test_a_run_in_turns_goes_on_with_the_same_config_alone(run):
  with pytest.raises(UserError, match='mixer.sampling'):
    Plan(mixed(seed=5), str(run[0]))
  moved = in_turns()
  moved.mixer.data.detection.max_bad_share = 0.5  # like data.max_bad_share, it may change
  Plan(moved, str(run[0]))


@pytest.mark.parametrize('values, words', [
    ({'mixer__weights': (1.0, -1.0, 1.0)}, r'mixer\.weights'),
    ({'mixer__weights': (0.0, 0.0, 0.0)}, r'mixer\.weights'),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('vision_tower', 2), ('txt_tower', 2))},
     "'txt_tower' matches no parameter"),
    ({'mixer__sampling': 'round_robin', 'mixer__balance': 'pcgrad'}, "set that to 'joint'"),
    ({'mixer__balance': 'best'}, "no balance 'best'")])
def test_a_mistake_is_one_line_before_anything_is_compiled(values, words, monkeypatch):
  monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda *_, **__: pytest.fail('compiled'))
  with pytest.raises(UserError, match=words) as error:
    c = mixed()
    c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in values.items()})
    Plan(c, 'unused')
  assert '\n' not in str(error.value)


def test_a_source_without_what_a_task_needs_is_one_line(tmp_path):
  Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
  for split in ('train', 'val'):
    (tmp_path / f'{split}.jsonl').write_text(json.dumps(
        {'image': 'a.png', 'objects': [{'name': 'dot', 'box': [1, 1, 3, 3]}]}) + '\n')
  c = mixed(('objects', 'vqa'))
  c.mixer.data.vqa = dict(source='jsonl', root=str(tmp_path))
  with pytest.raises(UserError, match='vqa: none of 1 .*answer'):
    Plan(c, 'unused')


def test_what_is_not_as_one_may_think_is_told():
  c = tiny.changed(data__train_examples=4)  # in batches of 8
  c.mixer.data.captioning.crowded = True
  assert {'config.mixer.data.captioning is not read: captioning is none of config.mixer.tasks',
          'vqa and objects: 6 of 6 steps read each of 4 training examples 12.0 times'} <= set(
              Plan(c, 'unused').notes)


# Eight devices


def gradnorm():
  return mixed(('vqa', 'objects'), mixer__balance='gradnorm')


def test_eight_devices_weigh_two_sources_as_one_does(tmp_path):
  out = subprocess.run([sys.executable, __file__, str(tmp_path / 'eight.npz')],
                       capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1],
                       env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
  assert out.returncode == 0, out.stderr[-3000:]
  eight = json.loads(out.stdout.splitlines()[-1])['metrics']
  one = three_steps((1, 1, 1), tmp_path / 'one.npz', gradnorm())['metrics']
  assert one[0]['objects/weight'] != one[2]['objects/weight']
  for a, b in zip(one, eight, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=5e-4, abs=1e-5), key
  a, b = np.load(tmp_path / 'one.npz'), np.load(tmp_path / 'eight.npz')
  for name in a:
    if name.startswith('gradient') and not name.endswith('key/bias'):
      assert np.linalg.norm(b[name] - a[name]) < 1e-4 * np.linalg.norm(a[name]), name


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps(three_steps((2, 2, 2), sys.argv[1], gradnorm())))
