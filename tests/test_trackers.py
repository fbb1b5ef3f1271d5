"""Trackers: CSV files, services by stand-ins of their packages, and trackers of one's own."""

import csv
import json
import os
import sys

import pytest
import tiny

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.train.logs.report import Report
from xmodal.train.logs.trackers.tracker import TRACKERS
from xmodal.train.plan import Plan

# Records calls as the packages take them: wandb.init(project, id, ...), run.log(numbers, step=...).
STAND_IN = '''
calls = []


class Run:
  def log(self, numbers, step):
    calls.append(('log', numbers, step))

  def finish(self):
    calls.append(('finish',))


def init(*, project, name, config, resume, **options):
  calls.append(('init', dict(options, project=project, name=name, config=config, resume=resume)))
  return Run()
'''
NUMBERS = {'loss': 1.0, 'skipped': 0.0}


def begin(workdir, *names, start=0, **values):
  os.makedirs(workdir, exist_ok=True)
  config = tiny.changed(train__trackers=names, **values)
  return Report(str(workdir), steps=9, start=start, batch_size=8, config=config)


@pytest.fixture(params=['wandb', 'trackio'])
def service(request, tmp_path, monkeypatch):
  """(name of a service, calls of its package)"""
  (tmp_path / f'{request.param}.py').write_text(STAND_IN)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, request.param, raising=False)
  yield request.param, __import__(request.param).calls
  sys.modules.pop(request.param)


@pytest.fixture
def own():
  """Registers a tracker; yields what it received and the step at which it fails."""
  got, fails_at = [], []

  @TRACKERS.register('own', options={'own_word': Option('a', 'A word.', may_change=True)})
  class Own:
    def __init__(self, run, own_word):
      got.append((run.start, own_word))
      if 'open' in fails_at:
        raise OSError('no route\nto host')

    def add(self, step, split, numbers):
      if step in fails_at:
        raise ConnectionError('gone')
      got.append((step, split, dict(numbers)))

    def close(self):
      got.append('closed')

  yield got, fails_at
  TRACKERS._parts.pop('own')


def test_a_service_gets_all_metrics_and_a_resumed_run_continues_its_run(service, tmp_path):
  name, calls = service
  report = begin(tmp_path / 'run', name, train__project='birds')
  report.train(1, NUMBERS)
  report.write(1, 'eval', {'vqa/accuracy': 0.5})
  report.close()
  begin(tmp_path / 'run', name, start=1).close()
  begin(tmp_path / 'run', name).close()  # from its beginning: another run
  first, second, third = (call[1] for call in calls if call[0] == 'init')
  assert first['project'] == 'birds' and first['config']['train']['steps'] == 6
  assert json.dumps(first['config'])
  assert {**second, 'config': 0, 'project': 0} == {**first, 'config': 0, 'project': 0}
  assert second['project'] == 'xmodal' and second['resume'] == 'allow'
  assert third['name'] != first['name'] and first['name'].startswith('run-')
  assert calls[1][1].items() >= {'train/loss': 1.0, 'train/skipped': 0.0}.items()
  assert 'train/examples_per_second' in calls[1][1] and calls[1][2] == 1
  assert calls[2:4] == [('log', {'eval/vqa/accuracy': 0.5}, 1), ('finish',)]


def rows(path):
  with open(path, encoding='utf-8', newline='') as f:
    return list(csv.DictReader(f))


def test_csv_files_have_one_header_for_all_rows_also_in_a_resumed_run(tmp_path):
  report = begin(tmp_path, 'csv')
  report.write(1, 'train', {'loss': 1.0})
  report.write(2, 'train', {'loss': float('nan'), 'vqa/"odd", name': 0.25})
  report.write(3, 'train', {'loss': 3.0})
  report.write(3, 'eval', {'vqa/accuracy': 0.5})
  train = [{'step': '1', 'loss': '1.0', 'vqa/"odd", name': ''},
           {'step': '2', 'loss': 'nan', 'vqa/"odd", name': '0.25'},
           {'step': '3', 'loss': '3.0', 'vqa/"odd", name': ''}]
  assert rows(tmp_path / 'csv' / 'train.csv') == train
  assert rows(tmp_path / 'csv' / 'eval.csv') == [{'step': '3', 'vqa/accuracy': '0.5'}]
  with open(tmp_path / 'csv' / 'train.csv', 'a') as f:
    f.write('4,2.')  # a crash cut this row
  report = begin(tmp_path, 'csv', start=2)
  report.write(3, 'train', {'loss': 4.0, 'vqa/cls': 1.0})
  found = rows(tmp_path / 'csv' / 'train.csv')
  assert [row['step'] for row in found] == ['1', '2', '3']
  assert found[2] == {'step': '3', 'loss': '4.0', 'vqa/"odd", name': '', 'vqa/cls': '1.0'}
  assert not (tmp_path / 'csv' / 'eval.csv').exists()


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(own, tmp_path, capsys):
  got, fails_at = own
  report = begin(tmp_path, 'own', 'csv')
  fails_at.append(2)
  for step in (1, 2, 3):
    report.write(step, 'train', {'loss': 1.0})
  report.close()
  assert got == [(0, 'a'), (1, 'train', {'loss': 1.0})]
  out = capsys.readouterr().out
  assert out.count("the tracker 'own' failed (ConnectionError: gone)") == out.count('\n') == 1
  assert len(rows(tmp_path / 'csv' / 'train.csv')) == 3
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3


def test_a_tracker_that_does_not_open_ends_a_new_run_and_not_one_that_goes_on(own, tmp_path,
                                                                              capsys):
  _, fails_at = own
  fails_at.append('open')
  with pytest.raises(UserError, match=r"'own' cannot be opened \(OSError: no route to host\)"):
    begin(tmp_path, 'own')
  report = begin(tmp_path, 'own', start=2)
  report.write(3, 'train', {'loss': 1.0})
  report.close()
  assert "the tracker 'own' failed" in capsys.readouterr().out


def test_an_own_tracker_has_keys_of_its_own(own, tmp_path):
  got, _ = own
  begin(tmp_path, 'own', train__own_word='b').close()
  assert got == [(0, 'b'), 'closed']
  c = tiny.changed(train__trackers=('csv', 'own'))
  configs.check_given(c, ['train.own_word'])
  with pytest.raises(UserError, match="config.train.project means nothing .* take 'trackio' or"):
    configs.check_given(c, ['train.project'])


@pytest.mark.parametrize('mode', ['train', 'dry_run'])
@pytest.mark.parametrize('names, words', [
    (('tensorbord',), "no tracker 'tensorbord' .did you mean 'tensorboard'"),
    (('csv', 'far_away'), "'far_away' needs a package .* pip install far_away_package")])
def test_what_cannot_be_opened_is_one_line_before_all_else(tmp_path, monkeypatch, names, words,
                                                           mode):
  TRACKERS.register('far_away', package='far_away_package')(begin)
  try:
    with pytest.raises(UserError, match=words) as error:
      Plan(tiny.changed(train__trackers=names), str(tmp_path / 'run'), mode)
  finally:
    TRACKERS._parts.pop('far_away')
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_a_run_without_trackers_has_its_metrics(tmp_path):
  report = begin(tmp_path)
  report.train(1, NUMBERS)
  report.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl']
