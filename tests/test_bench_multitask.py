"""bench.multitask: its runs, its tables, and the cost of steps."""

import json
import os
import pathlib
import runpy
import signal
import types

import jax
import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal import main
from xmodal.bench import multitask, multitask_cost
from xmodal.bench.multitask_plan import Setting, label_settings, main_settings
from xmodal.mixer.sampling.sampling import Sampling, StepKind
from xmodal.tasks.task import TASKS
from xmodal.train import build
from xmodal.train import run as runs
from xmodal.train.logs.report import Report
from xmodal.train.plan import Plan

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / 'tests' / 'tiny.py')
HEAD = '| setting | steps | batches'
BOTH = ('vqa', 'objects')
ALONE, PLAIN = Setting(('vqa',), 20), Setting(BOTH, 20)
TURNS = Setting(BOTH, 20, sampling='round_robin')
LONG = Setting(BOTH, 40, sampling='round_robin')


@pytest.fixture
def bench(monkeypatch, capsys):
  """Runs the benchmark on tests/tiny.py in this process: (exit code, stdout, stderr)."""
  monkeypatch.setattr(main, 'use_two_cores', lambda config: jax.devices())

  def run(workdir, *args):
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
      code = multitask.main(['--config', TINY, '--workdir', str(workdir), *args])
    finally:
      signal.signal(signal.SIGTERM, handler)
    return code, *capsys.readouterr()

  return run


def write_run(workdir, setting, seed, **curves):
  """Writes a finished run as train.run does; curves: scores of each task at its evaluations."""
  folder = os.path.join(workdir, setting.folder(seed))
  os.makedirs(folder)
  config = setting.config(tiny.get_config(), seed)
  configs.save(build.resolve(config, {}), os.path.join(folder, 'config.json'))
  report = Report(folder, steps=setting.steps, start=0, batch_size=8)
  for step in (1, 2, 3):
    report.write(step, 'train', {'loss': 1.0, 'examples_per_second': 100.0 * step ** 2})
  keys = {'vqa': 'accuracy', 'objects': 'f1'}
  for task, numbers in curves.items():
    for i, number in enumerate(numbers, 1):
      report.write(setting.steps * i // len(numbers), 'eval', {f'{task}/{keys[task]}': number})
  report.close()
  (pathlib.Path(folder) / 'final.json').write_text('{}')


def table(text, header):
  """Rows of the Markdown table whose head begins with these words."""
  lines = text[text.index(header):].split('\n\n')[0].splitlines()[2:]
  return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


def test_the_table_is_made_of_finished_runs_and_trains_none(bench, tmp_path, monkeypatch):
  monkeypatch.setattr('xmodal.train.plan.Plan', None)
  runs = {
      ALONE: [dict(vqa=[0.3, 0.5]), dict(vqa=[0.4, 0.6])],
      Setting(('objects',), 20): [dict(objects=[0.2, 0.8]), dict(objects=[0.3, 0.9])],
      PLAIN: [dict(vqa=[0.55, 0.66], objects=[0.5, 0.6]),
              dict(vqa=[0.57, 0.70], objects=[0.5, 0.7])],
      TURNS: [dict(vqa=[0.1, 0.5], objects=[0.5, 0.80]), dict(vqa=[0.1, 0.5], objects=[0.5, 0.84])],
      LONG: [dict(vqa=[0.1, 0.2, 0.7, 0.5], objects=[0.9, 0.9, 0.9, 0.9]),
             dict(vqa=[0.1, 0.2, 0.7, 0.7], objects=[0.9, 0.9, 0.9, 0.9])]}
  for setting, of_seeds in runs.items():
    for seed, curves in enumerate(of_seeds):
      write_run(tmp_path, setting, seed, **curves)
  code, out, err = bench(tmp_path, '--steps', '20', '--seeds', '2', '--samplings',
                         'round_robin,joint', '--balances', 'fixed')
  assert (code, err) == (0, '')
  assert (tmp_path / 'table.md').read_text().strip() in out
  # objects of PLAIN is below alone by more than the larger spread, 0.1; vqa of TURNS is not.
  assert table(out, HEAD) == [
      ['vqa alone', '20', '20', '2', '0.550 (0.100)', '', '400', '', ''],
      ['objects alone', '20', '20', '2', '', '0.850 (0.100)', '400', '', ''],
      ['joint, fixed', '20', '20', '2', '0.680 (0.040)', '0.650 (0.100)', '400', 'vqa', 'objects'],
      ['round_robin, fixed', '20', '10', '2', '0.500 (0.000)', '0.820 (0.040)', '400', '', ''],
      ['round_robin, fixed', '40', '20', '2', '0.600 (0.200)', '0.900 (0.000)', '400', '', '']]
  assert table(out, '| setting | steps | vqa') == [
      ['joint, fixed', '20', '10', 'never'], ['round_robin, fixed', '20', 'never', 'never'],
      ['round_robin, fixed', '40', '30', '10']]
  results = json.loads((tmp_path / 'results.json').read_text())['settings']
  assert [r['name'] for r in results] == [row[0] for row in table(out, HEAD)]
  assert results[2]['final'] == {'vqa': [0.66, 0.70], 'objects': [0.6, 0.7]}
  np.testing.assert_allclose(results[2]['curve']['vqa'], [[10, 0.56], [20, 0.68]])


def test_one_seed_has_no_spread_and_so_nothing_is_above_or_below(bench, tmp_path):
  for setting, curves in {ALONE: dict(vqa=[0.5]), Setting(('objects',), 20): dict(objects=[0.5]),
                          PLAIN: dict(vqa=[0.9], objects=[0.1])}.items():
    write_run(tmp_path, setting, 0, **curves)
  code, out, _ = bench(tmp_path, '--steps', '20', '--seeds', '1', '--samplings', 'joint',
                       '--balances', 'fixed')
  assert code == 0
  assert table(out, HEAD)[2] == [
      'joint, fixed', '20', '20', '1', '0.900', '0.100', '400', '', '']


def test_a_finished_run_of_another_config_is_refused(bench, tmp_path):
  write_run(tmp_path, ALONE, 0, vqa=[0.5])
  path = tmp_path / ALONE.folder(0) / 'config.json'
  path.write_text(path.read_text().replace('"batch_size": 8', '"batch_size": 16'))
  code, out, err = bench(tmp_path, '--steps', '20')
  assert code == 2 and out == ''
  assert 'train.batch_size=16 there and 8 here' in err and len(err.splitlines()) == 1


def test_runs_of_equal_steps_and_of_equal_examples():
  base = tiny.get_config()
  base.mixer.data.objects.train_examples = 16
  settings, notes = main_settings(
      base, 50, ('joint', 'proportional', 'temperature', 'round_robin', 'alternating'),
      ('fixed', 'famo', 'pcgrad'))
  taken = {(s.sampling, s.balance, s.steps): tuple(s.order(base).count_steps((task,), s.steps)
                                                   for task in BOTH)
           for s in settings if s.together}
  assert notes == []
  assert taken.keys() == {
      ('joint', 'fixed', 50), ('joint', 'famo', 50), ('joint', 'pcgrad', 50),
      ('alternating', 'fixed', 50), *((sampling, 'fixed', steps) for sampling in (
          'proportional', 'temperature', 'round_robin') for steps in (50, 100))}
  assert taken['round_robin', 'fixed', 50] == (25, 25)
  assert taken['round_robin', 'fixed', 100] == (50, 50) == taken['alternating', 'fixed', 50]
  # 64 examples and 16; their roots are 8 and 4.
  assert taken['proportional', 'fixed', 100] == (80, 20)
  assert taken['temperature', 'fixed', 100] == (67, 33)


def test_a_sampling_whose_steps_are_those_of_another_is_left_out():
  settings, notes = main_settings(tiny.get_config(), 50, ('proportional', 'temperature'), ())
  assert notes == ['temperature: left out, its steps are those of proportional']
  assert {s.sampling for s in settings} == {'joint', 'proportional'}


def test_runs_differ_from_the_config_in_what_the_setting_says_alone():
  base = tiny.get_config()
  base.mixer.weights = (1.0, 10.0)
  alone = Setting(('objects',), 50).config(base, 3)
  assert (tuple(alone.mixer.tasks), tuple(alone.mixer.weights)) == (('objects',), (10.0,))
  assert (alone.seed, alone.train.steps, alone.train.eval_every) == (3, 50, 5)
  folders = {s.folder(0) for s in [*main_settings(base, 50, ('joint', 'round_robin'), ('famo',))[0],
                                   *label_settings(base, 50)]}
  assert len(folders) == 3 + 2 + 1 + 6  # both tables share the runs with all answers


def test_labels_are_compared_at_each_share(bench, tmp_path):
  for i, setting in enumerate(label_settings(tiny.get_config(), 20)):
    write_run(tmp_path, setting, 0, vqa=[i / 10])
  code, out, err = bench(tmp_path, '--labels', '--steps', '20', '--seeds', '1')
  assert (code, err) == (0, '')
  assert table(out, '| answers') == [['100%', '0.000', '0.100'], ['30%', '0.200', '0.300'],
                                     ['10%', '0.400', '0.500'], ['3%', '0.600', '0.700']]
  config = label_settings(tiny.get_config(), 20)[7].config(tiny.get_config(), 0)
  assert config.mixer.data.vqa.answers_share == 0.03 and config.data.answers_share == 1


def test_it_trains_and_goes_on(bench, tmp_path, monkeypatch):
  for task in BOTH:
    write_run(tmp_path, Setting((task,), 2), 0, **{task: [0.5]})
  command = (tmp_path, '--steps', '2', '--seeds', '1', '--samplings', 'joint',
             '--balances', 'fixed')
  whole = runs.train
  monkeypatch.setattr(runs, 'train', lambda run: {} if len(run.tasks) == 2 else 1 / 0)
  code, out, _ = bench(*command)
  assert code == 75 and 'stopped after 2 of 3 runs, results in ' in out
  assert out.rstrip().endswith('; the same command goes on')
  rows = table((tmp_path / 'table.md').read_text(), HEAD)
  assert [row[0] for row in rows] == ['vqa alone', 'objects alone']
  monkeypatch.setattr(runs, 'train', lambda run: whole(run) if len(run.tasks) == 2 else 1 / 0)
  code, out, _ = bench(*command)
  final = json.loads((tmp_path / Setting(BOTH, 2).folder(0) / 'final.json').read_text())
  scores = final['evaluation']
  assert code == 0 and table(out, HEAD)[2][4:6] == [
      f'{scores["vqa"]["accuracy"]:.3f}', f'{scores["objects"]["f1"]:.3f}']


def test_every_task_has_the_number_it_is_compared_by(tmp_path):
  """Scores every task on the sources of configs/multitask.py, without a model."""
  config = runpy.run_path(ROOT / 'configs' / 'multitask.py')['get_config']()
  names = tuple(TASKS)
  assert len(names) > 5 and set(config.mixer.tasks) < set(names)
  config.mixer.tasks, config.mixer.weights = names, (1.0,) * len(names)
  config.model = tiny.get_config().model
  config.data.train_examples = config.mixer.data.detection.eval_examples = 16
  config.mixer.data.regression.numbers = True
  config.data.eval_examples, config.train.batch_size, config.train.samples = 16, 8, 0
  run = Plan(config, str(tmp_path))
  traced = run.evaluation.predict_step
  run.evaluation.predict_step = lambda variables, batch: (batch['valid'], jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(traced, variables, batch)[1]))
  scores = run.evaluation.run(run.abstract.variables, 0, run.workdir)
  for name in names:
    assert np.isfinite(scores[name][TASKS[name].make.main_score])


# What steps cost


def test_cost_is_of_ratios_within_rounds(monkeypatch):
  """The machine becomes twice as slow between rounds, so ratios of medians would be wrong."""
  kinds = {task: StepKind((task,)) for task in BOTH}
  seconds = {'vqa alone': [1, 2, 2], 'objects alone': [3, 6, 6], 'fixed': [2, 4, 6],
             'famo': [3, 6, 6], kinds['vqa']: [1.5, 3, 3], kinds['objects']: [3.5, 7, 7]}
  monkeypatch.setattr(multitask_cost, 'Step', lambda run, kind: None)
  monkeypatch.setattr(multitask_cost, 'measure', lambda ways, rounds, steps: {
      way: seconds[way] for way in ways})

  def run(*kinds, turns=((0, 1),)):
    return types.SimpleNamespace(sampling=Sampling(kinds, turns))

  found = multitask_cost.measure_cost(
      {task: run(kinds[task]) for task in BOTH},
      {name: run(StepKind(BOTH)) for name in ('fixed', 'famo')},
      {'proportional': run(*kinds.values(), turns=((0, 3), (1, 1)))}, rounds=3, steps=1)
  assert found['fixed'] == {'seconds': 4, 'ratio': [0.5, 0.5, 0.75], 'over': 'sum of those alone'}
  assert found['famo'] == {'seconds': 6, 'ratio': [1.5, 1, 1.5], 'over': 'fixed'}
  # A cycle of three steps and one, four batches, in 8 s and then 16: two batches take half.
  assert found['proportional'] == {
      'seconds': 8, 'ratio': [2, 4 / 3, 2], 'over': 'fixed'}
  assert multitask_cost.cost_table(found).splitlines()[-1] == (
      '| proportional | 8.0000 | 2.000 | 1.333 | 2.000 | fixed |')


def test_cost_measures_real_steps(bench, tmp_path):
  code, out, err = bench(tmp_path, '--cost', '--steps', '2', '--samplings', 'joint', '--balances',
                         'fixed', '--rounds', '2', '--round-steps', '1')
  assert (code, err) == (0, '')
  rows = {row[0]: row[1:] for row in table(out, '| step')}
  assert rows.keys() == {'vqa alone', 'objects alone', 'fixed'}
  assert all(float(row[0]) > 0 for row in rows.values())
  median, low, high = map(float, rows['fixed'][1:4])
  assert 0 < low <= median <= high
  assert sorted(os.listdir(tmp_path)) == ['cost.md', 'results.json']


@pytest.mark.parametrize('arguments, message', [
    (['--tasks', 'vqa,detection'], "--tasks: 'detection' is none of vqa,objects"),
    (['--samplings', 'all'], "--samplings: 'all' is none of alternating,joint,"),
    (['--balances', 'none'], "--balances: 'none' is none of fixed,"),
    (['--steps', '0'], '--steps=0: wanted 1 or more'),
    (['--labels', '--tasks', 'objects'], "--labels compares vqa alone"),
    (['--cost', '--tasks', 'vqa'], '--cost compares tasks together'),
    (['--config', 'nowhere.py'], '--config=nowhere.py: wanted a Python file')])
def test_mistakes_are_one_line(bench, tmp_path, arguments, message):
  code, out, err = bench(tmp_path, *arguments)
  assert code == 2 and out == '' and len(err.splitlines()) == 1 and message in err
