"""Plugins from another folder: a task with options, a third modality, a source and a balance."""

import json
import subprocess
import sys

import jax
from PIL import Image
import pytest
import tiny

from xmodal import config as configs
from xmodal import predictor
from xmodal.data import check
from xmodal.data.pack import pack
from xmodal.data.sense import SENSES
from xmodal.data.sources.pack import read_pack
from xmodal.data.sources.source import SOURCES
from xmodal.errors import UserError
from xmodal.mixer.balance.balance import BALANCES
from xmodal.models.parts import PARTS
from xmodal.registry import load_plugins
from xmodal.tasks.task import TASKS
from xmodal.train import run as runs
from xmodal.train.optimizer.rates import rates
from xmodal.train.optimizer.schedules import SCHEDULES
from xmodal.train.plan import Plan
from xmodal.train.start import settings

LAB = '''
"""Rows of sensor readings beside pictures, and a task that says how high they are."""

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from xmodal.data.example import Example
from xmodal.data.sense import SENSES
from xmodal.data.sources.source import SOURCES
from xmodal.mixer.balance.balance import BALANCES, Balance
from xmodal.models.parts import PARTS, size
from xmodal.models.stream import Stream
from xmodal.options import Option
from xmodal.tasks.task import TASKS, Task
from xmodal.train.optimizer.schedules import SCHEDULES

ROWS, CHANNELS = 12, 3


@SENSES.register('sensor')
def encode(example):
  readings = (example.inputs or {}).get('sensor', np.zeros((0, CHANNELS)))
  padded = np.zeros((ROWS, CHANNELS), np.float32)
  padded[:len(readings)] = readings
  return {'readings': padded, 'known': np.arange(ROWS) < len(readings)}


@PARTS.register('rows', slot='sensor', first_parameters=('reading',),
                options={'hidden_dim': size('Width of its tokens.')},
                presets=dict.fromkeys(('tiny', 'small', 'base', 'large', 'xl'), {'hidden_dim': 16}),
                sharding=((r'reading/kernel$', (None, 'tensor')), (r'reading/bias$', ())))
class Rows(nn.Module):
  hidden_dim: int

  @nn.compact
  def __call__(self, readings, known, *, deterministic):
    return Stream(nn.gelu(nn.Dense(self.hidden_dim, name='reading')(readings)), known)


@SOURCES.register('waves', embedded=True, options={
    'waves': Option(2, 'Number of different waves.', low=2)})
def open_waves(split, *, train, image_size, waves):
  rng = np.random.default_rng(split == 'train')

  def example(i):
    readings = i % waves + rng.normal(0, 0.1, (ROWS - i % 4, CHANNELS))
    return Example(np.full((8, 8, 3), 128, np.uint8), question='which wave is it?',
                   answers=(str(i % waves),), inputs={'sensor': readings}, image_id=i)

  return [example(i) for i in range(64 if train else 20)]


@BALANCES.register('halves', options={'halves_at': Option(3, 'Steps at full weight.', low=1)})
class Halves(Balance):
  def __init__(self, tasks, task_weights, halves_at):
    super().__init__(tasks, task_weights)
    self._at = halves_at

  def init(self):
    return self._zeros('steps')

  def _weights(self, state, losses, active, gram, rng):
    return jnp.where(state['steps'] < self._at, 1.0, 0.5)

  def _update(self, state, losses, active, gram):
    return {'steps': state['steps'] + 1}


@TASKS.register('wave', options={
    'most': Option(4, 'Most waves told apart.', low=2, high=9),
    'question_length': Option(8, 'Tokens of a question.', low=2)})
class Wave(Task):
  name = 'wave'
  needs = ('sensor', 'answers')
  senses = ('sensor',)
  loss_weights = {'wave': 1.0}
  main_score = 'accuracy'

  def __init__(self, config, tokenizer):
    self._own, self._tokenizer = config.wave, tokenizer

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    return cls(config, tokenizer)

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    return cls(config, tokenizer)

  def encode(self, example, placement):
    tokens = self._tokenizer.encode([example.question or 'which'], self._own.question_length)[0]
    return {'tokens': tokens, 'wave': np.int32(int(example.answers[0]) if example.answers else 0),
            'weight': np.float32(bool(example.answers))}

  def head(self):
    return WaveHead(self._own.most)

  def weights(self, features):
    return {'wave': features['weight']}

  def losses(self, outputs, features):
    return {'wave': optax.softmax_cross_entropy_with_integer_labels(outputs, features['wave'])}

  def decode(self, arrays):
    return arrays['wave'].tolist()

  def score(self, examples, predictions):
    right = [int(e.answers[0]) == p for e, p in zip(examples, predictions)]
    return {'accuracy': float(np.mean(right)), 'examples': len(right)}


@SCHEDULES.register('stairs', options={'stair': Option(
    9, 'Steps at one rate.', low=1, may_change=True)})
def stairs(peak, end, steps, total, stair):
  return lambda step: peak * 0.5 ** (step // stair)


class WaveHead(nn.Module):
  most: int

  @nn.compact
  def __call__(self, towers, features, *, deterministic):
    fused = towers.fused(features['tokens'], self.senses_used)
    return nn.Dense(self.most, dtype=jnp.float32, name='class_head')(fused.pooled)

  senses_used = ('sensor',)

  def predict(self, towers, features):
    return {'wave': self(towers, features, deterministic=True).argmax(-1)}
'''


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  """The folder of a package my_lab."""
  folder = tmp_path_factory.mktemp('elsewhere')
  (folder / 'my_lab').mkdir()
  (folder / 'my_lab' / '__init__.py').write_text('')
  (folder / 'my_lab' / 'waves.py').write_text(LAB)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    load_plugins(('my_lab.waves',))
    yield folder
  for registry, name in ((SENSES, 'sensor'), (PARTS, 'rows'), (SOURCES, 'waves'),
                         (BALANCES, 'halves'), (TASKS, 'wave'), (SCHEDULES, 'stairs')):
    registry._parts.pop(name)
  sys.modules.pop('my_lab.waves')


def config(**values):
  return tiny.changed(**{
      'plugins': ('my_lab.waves',), 'data__source': 'waves', 'mixer__tasks': ('wave', 'vqa'),
      'mixer__weights': (1.0, 0.1), 'mixer__balance': 'halves', 'mixer__halves_at': 2,
      'wave__most': 2, 'train__steps': 60, 'train__eval_every': 60, 'train__checkpoint_every': 30,
      'train__log_every': 1, 'optimizer__learning_rate': 3e-3,
      'optimizer__schedule': 'stairs', 'optimizer__stair': 50, 'train__samples': 2, **values})


@pytest.fixture(scope='module')
def workdir(lab, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  runs.train(Plan(config(), str(workdir)))
  return workdir


def test_they_train_together(workdir):
  final = json.loads((workdir / 'final.json').read_text())
  assert final['evaluation']['wave'] == {'accuracy': 1.0, 'examples': 20}
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  learning_rates = [line['learning_rate'] for line in lines if 'learning_rate' in line]
  assert learning_rates[1:] == pytest.approx([3e-3] * 50 + [1.5e-3] * 9)
  weights = [line['weight'] for line in lines if line['task'] == 'wave' and 'weight' in line]
  assert weights[:4] == [1.0, 1.0, 0.5, 0.5]
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['wave']['most'] == 2 and saved['plugins'] == ['my_lab.waves']


def test_the_answer_depends_on_the_third_sense(workdir, lab):
  from my_lab.waves import open_waves
  model = predictor.Predictor(str(workdir))
  low, high = open_waves('val', train=False, image_size=8, waves=2)[:2]
  assert low.image.tolist() == high.image.tolist() and low.question == high.question
  assert model([low, high], 'wave')[1] == [0, 1]


def test_a_stopped_run_goes_on_and_another_process_evaluates(workdir, lab, tmp_path):
  run = tmp_path / 'run'
  runs.train(Plan(config(train__steps=30, train__eval_every=30), str(run)))
  runs.train(Plan(config(optimizer__schedule='constant'), str(run)))
  out = subprocess.run(
      [sys.executable, '-m', 'xmodal.main', '--config', tiny.__file__, '--mode=eval',
       f'--workdir={workdir}', "--config.plugins=('my_lab.waves',)", *(
           f'--config.{key}={value}' for key, value in changed().items())],
      capture_output=True, text=True, env=environment(lab))
  assert out.returncode == 0, out.stderr[-2000:]
  assert 'wave\naccuracy 100.0% of 20' in out.stdout


def changed():
  """The keys of `config` as on a command line."""
  return {'data.source': 'waves', 'mixer.tasks': "('wave','vqa')", 'mixer.weights': '(1.0,0.1)',
          'mixer.balance': 'halves', 'mixer.halves_at': 2, 'wave.most': 2, 'train.steps': 60,
          'optimizer.learning_rate': 3e-3}


def environment(lab):
  import os
  return {**os.environ, 'PYTHONPATH': os.pathsep.join([str(lab), *filter(None, sys.path)])}


@pytest.mark.parametrize('values, words', [
    ({'wave__most': 1}, 'config.wave.most=1: wanted 2 to 9'),
    ({'data__waves': 0}, 'config.data.waves=0: wanted 2 or more'),
    ({'model__sensor__name': 'rose'}, "config.model.sensor.name='rose': wanted rows")])
def test_options_of_plugins_are_checked(lab, values, words):
  with pytest.raises(UserError, match=words):
    Plan(config(**values), 'unused')


def test_a_plugin_that_cannot_be_imported_is_one_line():
  with pytest.raises(UserError, match="config.plugins: 'my_lob.waves' cannot be imported") as error:
    configs.base(('my_lob.waves',))
  assert '\n' not in str(error.value)


def test_a_plugin_that_takes_a_name_twice_is_one_line(tmp_path, monkeypatch):
  (tmp_path / 'thief.py').write_text(
      'from xmodal.tasks.task import TASKS, Task\n\n\n'
      "@TASKS.register('vqa')\nclass Mine(Task):\n  pass\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  with pytest.raises(UserError, match="the task 'vqa' is registered by xmodal.tasks.vqa"):
    load_plugins(('thief',))


@pytest.mark.parametrize('given, words', [
    ('detection.queries', "means nothing without 'detection' in config.mixer.tasks"),
    ('mixer.dwa_window', "means nothing to config.mixer.balance='fixed'; .* take 'dwa'"),
    ('optimizer.muon_rate', "take 'muon'"), ('data.crowded', "take 'shapes'")])
def test_an_option_of_a_part_that_is_not_chosen_is_one_line(given, words):
  c = tiny.changed(data__source='coco')
  with pytest.raises(UserError, match=words):
    configs.check_given(c, [given])


def test_all_keys_stand_in_the_table_with_their_help():
  text = configs.table()
  for key, option in configs.keys():
    assert f'  {key.rpartition(".")[2]} = ' in text and option.help in text, key
    assert option.help.endswith('.'), key


def test_the_third_tower_has_gradients_and_learns_more_slowly_where_it_says(workdir):
  abstract = Plan(config(), str(workdir)).abstract
  factors = rates(config(optimizer__layer_decay=0.5).optimizer, abstract.params)
  assert factors['backbone/more_towers_sensor/reading/kernel'] == 0.5
  assert factors['backbone/sensor_projection/kernel'] == 1
  names = [jax.tree_util.keystr(path)
           for path, _ in jax.tree_util.tree_leaves_with_path(abstract.params)]
  assert any("['more_towers_sensor']['reading']['kernel']" in name for name in names)


def test_the_third_tower_has_the_sizes_of_the_run_that_it_starts_from(workdir):
  then = config(model__sensor__hidden_dim=24)
  taken = ['backbone/more_towers_sensor/reading/kernel']
  assert settings.resolve(config(), then, taken, ()).model.sensor.hidden_dim == 24
  assert settings.resolve(config(), then, [], ()).model.sensor.hidden_dim is None
  assert settings.resolve(
      config(model__sensor__hidden_dim=8), then, taken, ()).model.sensor.hidden_dim == 8


LISTING = '''
from xmodal.data.example import Example
from xmodal.data.sources.source import SOURCES
from xmodal.options import Option


@SOURCES.register('listing', options={'said': Option('yes', 'The answer to all questions.')})
def read_listing(root, split, said):
  return [Example(f'{root}/{split}.png', question='is it?', answers=(said,))]
'''


def test_check_and_pack_read_the_source_of_a_plugin(tmp_path, monkeypatch, capsys):
  (tmp_path / 'listing.py').write_text(LISTING)
  monkeypatch.syspath_prepend(str(tmp_path))
  for split in ('train', 'val', 'test'):
    Image.new('RGB', (8, 8)).save(tmp_path / f'{split}.png')
  arguments = [str(tmp_path), '--source', 'listing', '--config.data.said=no']
  assert check.main(arguments) == 2
  assert '--source listing: no such source' in capsys.readouterr().err
  try:
    arguments.append("--config.plugins=('listing',)")
    assert check.main(arguments) == 0
    assert pack.main([*arguments, '--output', str(tmp_path / 'pack')]) == 0
    assert read_pack(str(tmp_path / 'pack'), 'val')[0].answers == ('no',)
  finally:
    sys.modules.pop('listing', None)
    SOURCES._parts.pop('listing', None)
