"""Goodput over several starts of a run, by hand."""

import json

import pytest

from xmodal.train.logs.goodput import FILE, Goodput


class Clock:
  def __init__(self, now=1000.0):
    self.now = now

  def __call__(self):
    return self.now


def begin(workdir, start, clock, **options):
  return Goodput(str(workdir), start, clock(), clock=clock, **options)


def test_steps_that_are_repeated_after_a_kill_count_as_lost(tmp_path):
  clock = Clock()
  first = begin(tmp_path, 0, clock)
  clock.now += 60  # compiling
  first.note(0, 0.0)
  clock.now += 100
  first.note(50, 100.0)
  assert first.total() == {'goodput': 0.625, 'total_seconds': 160.0, 'num_starts': 1}
  # Killed after step 50, resumed from step 40, on a machine whose clock shows less.
  clock = Clock(3.0)
  second = begin(tmp_path, 40, clock)
  assert second.total() == {'goodput': 0.5, 'total_seconds': 160.0, 'num_starts': 2}
  clock.now += 40
  second.note(50, 20.0)
  assert second.total() == {'goodput': 0.5, 'total_seconds': 200.0, 'num_starts': 2}
  # Its checkpoint is damaged: the next start has only 30 steps of the first.
  third = begin(tmp_path, 30, Clock())
  assert third.total() == {'goodput': 0.3, 'total_seconds': 200.0, 'num_starts': 3}
  # None is left.
  assert begin(tmp_path, 0, Clock()).total()['goodput'] == 0


def test_the_file_is_there_after_a_kill_and_is_not_written_at_each_step(tmp_path):
  clock = Clock()
  goodput = begin(tmp_path, 0, clock)
  written = []
  for step in range(1, 41):
    clock.now += 1
    goodput.note(step, float(step), soon=True)
    starts = json.loads((tmp_path / FILE).read_text())['starts']
    written.append(starts[-1]['to_step'])
  assert sorted(set(written)) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize('damage', ['', '{"starts": [{"from', '[]', '{"starts": [{}]}'])
def test_a_damaged_file_counts_as_no_earlier_start(tmp_path, damage):
  (tmp_path / FILE).write_text(damage)
  assert begin(tmp_path, 5, Clock()).total()['num_starts'] == 1
  assert json.loads((tmp_path / FILE).read_text())['num_starts'] == 1


def test_other_processes_write_nothing(tmp_path):
  goodput = begin(tmp_path, 0, Clock(), writes=False)
  goodput.note(1, 1.0)
  assert list(tmp_path.iterdir()) == []
