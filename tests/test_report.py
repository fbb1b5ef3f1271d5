"""The logs of a run: each metric once, after kills and crashes too."""

import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
import tiny

from xmodal.train.logs import metrics
from xmodal.train.logs.report import Report
from xmodal.train.logs.speed import Speed
from xmodal.train.optimizer.schedules import make_schedule

# TensorBoard reads with its own code then, and does not look for TensorFlow.
sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')

NUMBERS = {'loss': 1.0, 'vqa/accuracy': 0.5, 'skipped': 0.0}


def begin(workdir, start=0, steps=9, scored=()):
  return Report(str(workdir), steps=steps, start=start, batch_size=8, scored={'eval': scored},
                evaluates=start >= steps, config=tiny.get_config())


def train(report, *steps):
  for step in steps:
    report.train(step, {**NUMBERS, 'loss': float(step)})


def written(workdir, split, task):
  return [line['step'] for line in metrics.read(str(workdir / 'metrics.jsonl'))[0]
          if (line['split'], line['task']) == (split, task)]


def shown(workdir, tag):
  """The steps of a tag as TensorBoard shows them."""
  found = EventAccumulator(str(workdir / 'tensorboard'), {'scalars': 0}).Reload()
  return [e.step for e in found.Scalars(tag)] if tag in found.Tags()['scalars'] else []


def assert_each_once(workdir, train_steps, eval_steps):
  assert written(workdir, 'train', 'all') == shown(workdir, 'train/loss') == train_steps
  assert written(workdir, 'eval', 'vqa') == shown(workdir, 'eval/vqa/accuracy') == eval_steps


def test_a_killed_run_shows_each_step_once(tmp_path):
  report = begin(tmp_path)
  train(report, 1, 2)
  report = begin(tmp_path)  # killed before its first checkpoint
  assert_each_once(tmp_path, [], [])
  train(report, 1, 2, 3)
  report.write(3, 'eval', {'vqa/accuracy': 0.25})
  train(report, 4, 5)
  report = begin(tmp_path, start=3, scored=['vqa'])  # killed after it
  assert not report.overdue
  train(report, 4)
  assert_each_once(tmp_path, [1, 2, 3, 4], [3])
  event_file, = (tmp_path / 'tensorboard').iterdir()
  event_file.write_bytes(event_file.read_bytes()[:-9])  # the last event is cut
  train(begin(tmp_path, start=4), 5)
  assert_each_once(tmp_path, [1, 2, 3, 4, 5], [3])


def test_event_files_of_a_run_that_lost_some_are_completed(tmp_path):
  report = begin(tmp_path)
  train(report, 1, 2)
  report.write(2, 'eval', {'vqa/accuracy': float('nan')})
  for path in (tmp_path / 'tensorboard').iterdir():
    path.unlink()
  begin(tmp_path, start=2)
  assert_each_once(tmp_path, [1, 2], [2])


@pytest.mark.parametrize('tasks, owes', [((), True), (('vqa',), True), (('vqa', 'objects'), False)])
def test_an_evaluation_that_was_not_written_whole_is_made_again(tmp_path, tasks, owes):
  report = begin(tmp_path)
  train(report, 1, 2, 3)
  report.write(3, 'eval', {f'{task}/accuracy': 0.25 for task in tasks})
  report = begin(tmp_path, start=3, scored=['vqa', 'objects'])
  assert bool(report.overdue) == owes
  if owes:
    report.write(3, 'eval', {'vqa/accuracy': 0.5, 'objects/accuracy': 0.5})
  assert_each_once(tmp_path, [1, 2, 3], [3])


def test_the_last_evaluation_comes_again_also_where_steps_were_lowered(tmp_path):
  report = begin(tmp_path)
  train(report, 1, 2, 3)
  for steps in (3, 2):
    report.write(3, 'eval', {'vqa/accuracy': 0.25})
    report = begin(tmp_path, start=3, steps=steps, scored=['vqa'])
    assert_each_once(tmp_path, [1, 2, 3], [])


@pytest.mark.parametrize('damage, unreadable, left', [
    (lambda lines: [*lines, b'\0' * 300], 1, 3),
    (lambda lines: [lines[0], b'\0' * 4096, *lines[1:]], 1, 3),
    (lambda lines: [lines[0], b'\0' * 300 + lines[1], lines[2]], 0, 3),
    (lambda lines: [*lines[:2], lines[2][:20]], 1, 2),
    (lambda lines: [lines[0][30:], *lines[1:]], 1, 2),
    (lambda lines: [*lines, b'7', b'{}', b'null', b'[' * 100_000, b'\xff\xfe{', b'{"step": true}'],
     6, 3),
    (lambda lines: [*lines, lines[0]], 0, 3),
], ids=['end', 'middle', 'before', 'cut', 'beginning', 'else', 'twice'])
def test_lines_that_a_crash_left_are_dropped_and_told(tmp_path, capsys, damage, unreadable, left):
  train(begin(tmp_path), *(1, 2, 3))
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes().splitlines()
  lines = [line for line in before if b'"all"' in line]
  path.write_bytes(b'\n'.join(damage(lines)))
  capsys.readouterr()
  report = begin(tmp_path, start=3)
  said = capsys.readouterr().out
  assert said.count('\n') == bool(unreadable) and (
      not unreadable or f'{path}: {unreadable} lines cannot be read' in said)
  kept = path.read_bytes().splitlines()
  assert len(kept) == left and set(kept) <= set(lines)
  train(report, 4)
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()][-1] == 4


def test_speed_is_that_of_steps_alone(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr('time.perf_counter', lambda: now[0])
  report = begin(tmp_path)
  with report.pause(0):
    now[0] += 60  # compiling
  for step in (1, 2, 3, 4):
    now[0] += 2
    if step == 2:
      train(report, step)
    if step == 3:
      with report.pause(step):
        now[0] += 100  # an evaluation
  train(report, 4)
  assert report.speed.means()['examples_per_second'] == 4


def test_waiting_for_input_is_a_share_of_the_steps_time(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr('time.perf_counter', lambda: now[0])
  report = begin(tmp_path)
  ready = [True]
  last = types.SimpleNamespace(is_ready=lambda: ready[0])
  for step in (1, 2):
    for ready[0] in (False, True):  # the devices still compute the step before; they wait
      with report.speed.waiting(last):
        now[0] += 1
    now[0] += 2
    train(report, step)
  with report.pause(2):
    now[0] += 100
  now[0] += 8
  train(report, 3)
  lines = metrics.read(str(tmp_path / 'metrics.jsonl'))[0]
  assert [line['input_wait'] for line in lines if 'input_wait' in line] == [0.25, 0.25, 0.0]
  assert report.speed.means()['input_wait'] == 2 / 16


@pytest.mark.parametrize('device, mfu', [('NVIDIA H100 80GB HBM3', 0.1), ('cpu', None)])
def test_flops_are_the_mean_over_steps_of_several_kinds(monkeypatch, device, mfu):
  now = [0.0]
  monkeypatch.setattr('time.perf_counter', lambda: now[0])
  two = [types.SimpleNamespace(device_kind=device)] * 2
  monkeypatch.setattr('xmodal.train.logs.speed.jax.devices', lambda: two)
  speed = Speed(4, batch_size=8)
  assert 'model_flops_per_second' not in speed.means()
  peak = 2 * 989e12
  speed.flops = {5: 0.1 * peak, 6: 0.3 * peak, 7: 0.0}.get
  now[0] += 4
  speed.lap(6)
  numbers = speed.numbers()
  assert numbers['model_flops_per_second'] == pytest.approx(0.1 * peak)
  assert numbers.get('mfu') == (mfu and pytest.approx(mfu))
  now[0] += 4
  speed.lap(7)
  assert speed.numbers()['model_flops_per_second'] == 0
  assert speed.means()['model_flops_per_second'] == pytest.approx(0.05 * peak)


def test_a_run_logs_its_rate_its_norms_and_what_it_cost(finished):
  lines = [line for line in metrics.read(str(finished / 'metrics.jsonl'))[0]
           if (line['split'], line['task']) == ('train', 'all')]
  c = tiny.get_config()
  schedule = make_schedule(c.optimizer, c.train.steps)
  assert [line['learning_rate'] for line in lines] == [
      pytest.approx(float(schedule(step))) for step in range(6)]
  for line in lines:
    assert line['model_flops_per_second'] > 0 and line['parameter_norm'] > line['update_norm'] >= 0
    assert 'mfu' not in line  # no peak of a CPU is published
  final = json.loads((finished / 'final.json').read_text())
  # Towers of one layer on 32 x 32 pictures: a step of 8 examples is some millions of operations.
  assert 1e6 < final['model_flops_per_step'] < 1e9
  assert final['compile_seconds'] > 0 and final['peak_bytes_by_compiler'] > 0
  assert 0 < final['goodput'] < 1 and final['num_starts'] == 1
  assert final['total_seconds'] > final['compile_seconds']
