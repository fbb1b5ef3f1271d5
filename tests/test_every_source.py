"""What holds for every source of files: processes get it by pickle, and what it says of faults."""

import dataclasses
import pickle

import published
import pytest
from test_overview import facts
from test_pipeline import CHANGES, Boxes, assert_equal, maker
from test_remote_data import _SETS, assert_same
from test_workers import BATCH, started

from xmodal.data import pipeline
from xmodal.data.overview import overview_of
from xmodal.data.pack import pack
from xmodal.data.sources.pack import read_pack
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


def assert_packed(source, folder, split, *arguments):
  """A pack of a source has its batches, and a run learns the same from both."""
  out = str(folder / 'pack')
  assert pack.main([*arguments, '--output', out, '--splits', split, '--max_bad_share', '1']) == 0
  found = read_pack(out, split)
  plain, of_pack = (maker(of, Boxes(), CHANGES, share=1.0, seed=3) for of in (source, found))
  for a, b in zip(pipeline.train_batches(plain, BATCH, 0, 4),
                  pipeline.train_batches(of_pack, BATCH, 0, 4), strict=True):
    assert_equal(a, b)
  assert plain.bad.reasons.keys() == of_pack.bad.reasons.keys()
  learned = [facts(dataclasses.replace(overview_of(pipeline.sample(of)), foreign=None,
                                       tokenizer=None)) for of in (source, found)]
  assert learned[0] == learned[1] and learned[0]['size'] == len(source)


@pytest.mark.parametrize('name', _SETS)
def test_a_pack_gives_the_batches_and_vocabularies_of_its_source(name, tmp_path, monkeypatch):
  sample = pipeline.sample
  # As if the sets were larger than what is sampled of generated examples.
  monkeypatch.setattr(pipeline, 'sample', lambda source: sample(source, 0))
  source = opened(name, tmp_path)
  kind, split = name.partition('/')[0], _SETS[name][1]
  assert_packed(source, tmp_path, split, str(tmp_path / 'set'), '--source', kind)
