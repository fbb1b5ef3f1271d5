"""A run with all of XLA's optimisations, which the other tests disable."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from xmodal.sharding.rules import path_name
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.logs.report import Report
from xmodal.train.plan import Plan
from xmodal.train.steps import state as states


def config(*sizes):
  c = tiny.changed(mixer__tasks=('retrieval',), mixer__weights=(1.0,),
                   retrieval__caption_length=12, retrieval__embedding_dim=16,
                   train__checkpoint_every=1, train__samples=0)
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
  return c


def train(workdir, sizes):
  """Trains with all optimisations, except for initialisation, which compiles slowly."""
  create = states.create

  def quickly(*args):
    jax.config.update('jax_disable_most_optimizations', True)
    state = create(*args)
    jax.config.update('jax_disable_most_optimizations', False)
    return state

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(states, 'create', quickly)
    jax.config.update('jax_disable_most_optimizations', False)
    try:
      tiny.train(workdir, config(*sizes))
    finally:
      jax.config.update('jax_disable_most_optimizations', True)


def run_optimised(*arguments):
  """Runs this file as a program on eight devices."""
  flags = os.environ['XLA_FLAGS'].replace('--xla_cpu_use_fusion_emitters=false', '')
  return subprocess.run(
      [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True,
      cwd=pathlib.Path(__file__).parents[1],
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
           'XLA_FLAGS': flags})


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Runs on one device, on eight, and on eight with a kill and resume."""
  folder = tmp_path_factory.mktemp('optimised')
  one, eight, killed = (folder / name for name in ('one', 'eight', 'killed'))
  train(one, (1, 1, 1))
  out = run_optimised('killed', killed)
  assert out.returncode == -signal.SIGKILL, out.stderr[-3000:]
  assert not (killed / 'final.json').exists()
  out = run_optimised(eight, killed)
  assert out.returncode == 0, out.stderr[-3000:]
  return one, eight, killed


def losses(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['loss'] for line in lines if line['split'] == 'train' and line['task'] == 'all']


@pytest.fixture(scope='module')
def ended(workdirs):
  """The last state of each run."""
  abstract, found = Plan(config(1, 1, 1), 'unused').abstract, []
  for workdir in workdirs:
    checkpoints = Checkpoints(str(workdir), keep=5)
    found.append(jax.device_get(checkpoints.restore(abstract, pytest.fail)))
    checkpoints.close()
  return found


def test_a_killed_run_on_eight_devices_goes_on_bit_for_bit(workdirs, ended):
  _, eight, killed = workdirs
  assert 1 <= json.loads((killed / 'final.json').read_text())['resumed_from'] <= 5
  assert ended[1].step == 6
  jax.tree.map(np.testing.assert_array_equal, ended[2], ended[1])
  assert losses(killed) == losses(eight)


def test_eight_devices_train_as_one(workdirs, ended):
  one, eight, _ = workdirs
  np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-4)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ended[1].params),
                          jax.tree.leaves(ended[0].params), strict=True):
    # A key bias shifts all logits of a query equally, so AdamW steps along rounding errors.
    if not path_name(path).endswith('key/bias'):
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=path_name(path))
  a, b = (json.loads((folder / 'final.json').read_text())['evaluation']['retrieval']
          for folder in (one, eight))
  assert a['pictures'] == 20 and b == pytest.approx(a, rel=1e-4)


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  *dies, last = sys.argv[1:]
  if dies == ['killed']:
    advance = Report.advance
    Report.advance = lambda self, step, metrics: (
        os.kill(os.getpid(), signal.SIGKILL) if step == 4 else advance(self, step, metrics))
    dies = []
  for workdir in (*dies, last):
    train(workdir, (2, 2, 2))
