"""What holds for every source of files: processes get it by pickle, and what it says of faults."""

import pickle

import published
import pytest
from test_pipeline import CHANGES, Boxes, assert_equal, maker
from test_remote_data import _SETS, assert_same
from test_workers import BATCH, started

from xmodal.data import pipeline
from xmodal.data.sources.source import SOURCES


def opened(name, folder):
  """A source of the sets of test_remote_data, whose files are written to a folder."""
  files, split = _SETS[name]
  root = published.write(folder / 'set', files | {'notes.txt': 'x'})
  return SOURCES[name.partition('/')[0]].make(root, split)


@pytest.mark.parametrize('name', _SETS)
def test_another_process_gets_it_by_pickle(name, tmp_path):
  source = opened(name, tmp_path)
  assert_same(pickle.loads(pickle.dumps(source)), source, str(tmp_path), str(tmp_path))


@pytest.mark.parametrize('name', ['parquet', 'yolo'])  # pictures inside a file; faults
def test_processes_make_the_batches_of_threads(name, tmp_path):
  source = opened(name, tmp_path)
  assert name != 'yolo' or [fault.kind for fault in source.faults]
  plain, many = (maker(source, Boxes(), CHANGES, share=1.0, seed=3) for _ in range(2))
  expected = list(pipeline.train_batches(plain, BATCH, 0, 4))
  with started(many) as many:
    for a, b in zip(expected, pipeline.train_batches(many, BATCH, 0, 4), strict=True):
      assert_equal(a, b)
  assert many.bad.reasons == plain.bad.reasons
