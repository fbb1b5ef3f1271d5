"""Runs in buckets: a run that goes on elsewhere ends like one on this machine."""

import json
import os
import pathlib
import shutil

import buckets
import jax
import numpy as np
from PIL import Image
import pytest
import tiny

from xmodal import storage
from xmodal.errors import UserError
from xmodal.train import run as runs
from xmodal.train.checkpoints import checkpoint
from xmodal.train.plan import Plan
from xmodal.train.process import lock
from xmodal.train.process.mirror import RunFolder
from xmodal.train.process.stop import Stop


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
  """Lines of metrics.jsonl without the speed."""
  lines = [json.loads(line) for line in text.splitlines()]
  return [{key: value for key, value in line.items() if key != 'examples_per_second'}
          for line in lines]


def arrays(address):
  """The state of the newest checkpoint."""
  if storage.scheme(address) == 'gs':
    return tiny.restored(address)
  folder = RunFolder(address)
  folder.fetch()
  checkpoints = checkpoint.Checkpoints(address, 5, local=folder.local)
  state = checkpoints.restore(tiny._abstract(), pytest.fail)
  checkpoints.close()
  return jax.device_get(state)


@pytest.fixture(scope='module', params=['gs', 's3'])
def address(request, emulators):
  """A run in a bucket that was stopped after step 4 and went on on another machine."""
  address = f'{request.param}://{buckets.BUCKET}/runs/tiny'
  with pytest.MonkeyPatch.context() as patch:
    places = []
    patch.setattr(Stop, 'reached', lambda self: places.append(1) or len(places) == 4)
    assert tiny.train(address) == {}
  assert sorted(checkpoint.saved_steps(address)) == [3, 4]
  assert not storage.exists(f'{address}/running.json')
  forget_this_machine()
  assert tiny.train(address)['resumed_from'] == 4
  return address


def test_it_ends_bit_for_bit_like_a_run_on_this_machine(address, finished):
  assert sorted(checkpoint.saved_steps(address)) == [4, 6]
  assert_same(arrays(address), tiny.restored(finished))
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


def test_eval_gives_the_scores_of_the_training(address, finished):
  forget_this_machine()
  scores = runs.evaluate_newest(Plan(tiny.get_config(), address, 'eval'))
  assert scores['vqa'] == json.loads((finished / 'final.json').read_text())['evaluation']['vqa']
