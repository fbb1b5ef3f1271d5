"""Batches made by processes are those made by threads, whatever happens to the processes."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading

import numpy as np
from PIL import Image
import pytest
from test_pipeline import CHANGES, Boxes, Number, assert_equal, maker, numbered
import tiny

from xmodal.data import pipeline
from xmodal.data.example import Example, Object
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.worker import owners
from xmodal.data.workers import Workers
from xmodal.errors import UserError
from xmodal.train import run as runs
from xmodal.train.logs import metrics
from xmodal.train.plan import Plan
from xmodal.train.process.stop import Stop

BATCH = 8


@contextlib.contextmanager
def started(make, count=2, said=None):
  """The maker with processes."""
  make = dataclasses.replace(make, name='train')
  with contextlib.closing(Workers([[(make, BATCH)]], count,
                                  (said if said is not None else []).append)) as workers:
    yield dataclasses.replace(make, workers=workers)


def children(make):
  """Process ids of the processes that make rows."""
  parent = make.workers._process.pid
  with open(f'/proc/{parent}/task/{parent}/children', encoding='utf-8') as f:
    return [int(number) for number in f.read().split()]


class Mortal:
  """A source that kills the process which reads a record, once for each file of a folder."""

  def __init__(self, source, folder, record=5):
    self._source, self._folder, self._record = source, folder, record

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if index == self._record and (left := sorted(os.listdir(self._folder))):
      os.remove(os.path.join(self._folder, left[0]))
      os.kill(os.getpid(), signal.SIGKILL)
    return self._source[index]


class Broken(list):
  """A source with a defect."""

  def __getitem__(self, index):
    if index == 3:
      raise ZeroDivisionError('in the source')
    return super().__getitem__(index)


@pytest.mark.parametrize('count', [1, 3])
def test_any_number_of_processes_makes_the_batches_of_threads(count):
  make = maker(Shapes('train', size=20, image_size=32), Boxes(), CHANGES, seed=5,
               decode=KeepDecoded(2**20))
  expected = list(pipeline.train_batches(make, BATCH, 2, 9))
  with started(make, count) as many:
    rows = np.array([1, 2, 6])
    other = pipeline.train_batches(many, BATCH, 3, 4, rows)  # beside the first
    for a, b in zip(expected, pipeline.train_batches(many, BATCH, 2, 9), strict=True):
      assert_equal(a, b)
    np.testing.assert_array_equal(next(other)['image'], expected[1]['image'][rows])
    next(half := pipeline.train_batches(many, BATCH, 0, 10**9))
    half.close()
    for a, b in zip(pipeline.eval_batches(make, BATCH), pipeline.eval_batches(many, BATCH),
                    strict=True):
      assert_equal(a, b)


@pytest.mark.parametrize('count', [1, 3, 14])
def test_rows_are_shared_out_evenly_and_mostly_by_record(count):
  records = np.random.default_rng(count).integers(-1, 10**6, 256)
  owner = owners(records, count)
  assert np.bincount(owner, minlength=count).max() <= -(-256 // count) and set(owner) == {
      *range(count)}
  assert (owner == records % count).mean() > 0.8
  np.testing.assert_array_equal(owners(np.arange(64), count), np.arange(64) % count)
  np.testing.assert_array_equal(np.bincount(owners(np.zeros(8 * count, int), count)), 8)
  assert len(owners(np.zeros(0, int), count)) == 0


def test_memory_holds_six_of_the_largest_job():
  makes = [dataclasses.replace(maker(numbered(8), Number(), size=(64, 64)), name=name)
           for name in 'abc']
  picture = 64 * 64 * 3
  largest = [[(makes[0], 4), (makes[1], 4)], [(makes[2], 6)]]
  with contextlib.closing(Workers(largest, 1, print)) as workers:
    assert 6 * 8 * picture < len(workers._memory) < 6 * 9 * picture


def test_what_is_wrong_with_records_is_counted_by_the_trainer(tmp_path):
  Image.new('RGB', (10, 10)).save(tmp_path / 'good.png')
  source = [Example(str(tmp_path / 'good.png'), number=float(i)) for i in range(10)]
  source[7] = Example(str(tmp_path / 'missing.png'))
  source[2] = dataclasses.replace(source[2], objects=(Object('dot', (5, 5, 9, 2)),),
                                  recorded_size=(20, 10))
  plain, many = (maker(source, Number(), share=0.1) for _ in range(2))
  expected = list(pipeline.eval_batches(plain, BATCH))
  with started(many) as many:
    for a, b in zip(expected, pipeline.eval_batches(many, BATCH), strict=True):
      assert_equal(a, b)
    assert many.bad.reasons == plain.bad.reasons and list(many.bad.reasons) == [7]
    assert many.bad_boxes.lines() == plain.bad_boxes.lines() and len(many.bad_boxes.lines()) == 2
    strict = dataclasses.replace(many, bad=pipeline.BadPictures(len(source), 0.05))
    with pytest.raises(UserError, match='1 of 10 pictures cannot be read.*missing.png'):
      list(pipeline.eval_batches(strict, BATCH))


def test_a_defect_is_raised_as_itself():
  with started(maker(Broken(numbered(8)), Number())) as make:
    with pytest.raises(ZeroDivisionError, match='in the source'):
      list(pipeline.eval_batches(make, BATCH))


def test_a_killed_process_is_replaced_and_its_rows_made_again(tmp_path):
  (tmp_path / 'once').touch()
  said, source = [], numbered(20)
  expected = list(pipeline.train_batches(maker(source, Number()), BATCH, 0, 6))
  with started(maker(Mortal(source, str(tmp_path)), Number()), said=said) as make:
    for a, b in zip(expected, pipeline.train_batches(make, BATCH, 0, 6), strict=True):
      assert_equal(a, b)
  assert said == ['a process that reads pictures died (killed, perhaps as memory ran out): '
                  'started again']


class Stillborn(list):
  """A source that ends the process which receives it."""

  def __reduce__(self):
    return os._exit, (3,)


def test_a_picture_that_ends_every_process_is_an_unreadable_one(tmp_path):
  for i in range(99):
    (tmp_path / str(i)).touch()
  source, said = numbered(20), []
  plain = maker([Example('missing.png') if i in (5, 6) else e for i, e in enumerate(source)],
                Number(), share=0.1)
  expected = [*pipeline.train_batches(plain, BATCH, 0, 6), *pipeline.eval_batches(plain, BATCH)]
  deadly = Mortal(Mortal(source, str(tmp_path)), str(tmp_path), record=6)
  with started(maker(deadly, Number(), share=0.1), said=said) as make:
    found = [*pipeline.train_batches(make, BATCH, 0, 6), *pipeline.eval_batches(make, BATCH)]
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_array_equal(a['valid'], b['valid'])
    np.testing.assert_array_equal(a['image'], b['image'])
    np.testing.assert_array_equal(a['task']['number'][a['valid']], b['task']['number'][b['valid']])
  assert make.bad.reasons == {n: f'record {n}: the process that read it died (killed, perhaps as '
                                 'memory ran out)' for n in (5, 6)}
  assert len(said) <= 6
  with started(maker(deadly, Number())) as make:
    with pytest.raises(UserError, match='1 of 20 pictures cannot be read.*: record [56]: the proc'):
      list(pipeline.train_batches(make, BATCH, 0, 6))


def test_processes_that_go_on_dying_end_the_run():
  with started(maker(Stillborn(numbered(20)), Number())) as make:
    with pytest.raises(UserError, match=r'died \(exit code 3\), the 4th time: lower '
                                        'config.data.workers=2') as error:
      list(pipeline.train_batches(make, BATCH, 0, 6))
  assert '\n' not in str(error.value)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_they_ignore_signals_of_the_terminal_and_end_with_the_trainer():
  with started(maker(numbered(8), Number())) as make:
    batch, = pipeline.train_batches(make, BATCH, 0, 1)
    found = children(make)
    assert len(found) == 2
    for process in found:
      os.kill(process, signal.SIGINT)
      os.kill(process, signal.SIGTERM)
    again, = pipeline.train_batches(make, BATCH, 0, 1)
    assert_equal(batch, again)
  assert not any(os.path.exists(f'/proc/{process}') for process in found)


@contextlib.contextmanager
def waiting(make):
  """What happens to a thread that waits for batches: a list, of its error when this ends."""
  met = []

  def wait():
    try:
      list(pipeline.train_batches(make, BATCH, 0, 3))
    except Exception as error:
      met.append(error)

  thread = threading.Thread(target=wait, daemon=True)
  thread.start()
  yield met
  thread.join(60)
  assert not thread.is_alive()


def test_closing_them_ends_the_wait_for_a_batch(monkeypatch):
  asked = threading.Event()
  monkeypatch.setattr(Workers, '_take', lambda self, *_: asked.set())  # no batch is ever done
  with started(maker(numbered(8), Number())) as make:
    with waiting(make) as met:
      assert asked.wait(60)
      make.workers.close()
  assert 'are closed' in str(met[0])


def test_an_error_of_the_thread_that_receives_reaches_those_who_wait(monkeypatch):
  def fail(*_, **__):
    raise OSError('no memory for a process')

  with started(maker(numbered(8), Number())) as make:
    monkeypatch.setattr(Workers, '_start', fail)
    os.kill(make.workers._process.pid, signal.SIGKILL)
    with waiting(make) as met:
      pass
  assert 'no memory for a process' in str(met[0])


def test_what_cannot_be_sent_is_one_line():
  with pytest.raises(UserError, match='cannot be sent to another process.*set 0 for threads'):
    with started(maker(numbered(8), Number(), senses={'touch': lambda example: {}})):
      pass


def test_a_run_with_processes_learns_what_one_with_threads_does(finished, tmp_path, monkeypatch):
  c = tiny.changed(data__workers=2)
  with monkeypatch.context() as patch:
    patch.setattr(Stop, 'reached', lambda self: True)
    assert tiny.train(tmp_path, c) == {}
  told = tiny.train(tmp_path, c)
  assert told['resumed_from'] > 0
  found, expected = (
      {(line['step'], line['split'], line['task']): line.get('loss') for line in
       metrics.read(str(folder / 'metrics.jsonl'))[0]} for folder in (tmp_path, finished))
  assert found == expected and len(list(filter(None, found.values()))) > 6
  assert told['evaluation'] == json.loads((finished / 'final.json').read_text())['evaluation']
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'threaded', None)  # processes make all batches
    assert runs.evaluate_newest(Plan(c, str(tmp_path), 'eval')) == told['evaluation']
