"""Several processes, as on the hosts of a pod: the same run as this process, with one device."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import tiny

ROOT = pathlib.Path(__file__).parents[1]


def run_hosts(workdir, *changes):
  """Runs xmodal.main on two hosts of one device each; returns final.json."""
  command = [sys.executable, '-m', 'xmodal.main', '--config', ROOT / 'tests' / 'tiny.py',
             '--workdir', workdir, *changes]
  # What Slurm tells each process it starts; JAX makes its port of the job's number.
  slurm = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost',
           'SLURM_NTASKS': '2', 'SLURM_LOCALID': '0', 'JAX_NUM_CPU_DEVICES': '1'}
  processes = [
      subprocess.Popen(
          [*map(str, command), '--multihost'], cwd=ROOT, text=True, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, env={**os.environ, **slurm, 'SLURM_PROCID': str(host)})
      for host in range(2)]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert not any(process.returncode for process in processes), '\n'.join(outputs)[-4000:]
  assert not any('starting' in out or 'going on' in out for out in outputs[1:])  # one speaks
  return json.loads((workdir / 'final.json').read_text())


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """By number of hosts: three steps, then three more; of two hosts first with the batch split, then
  with the layers."""
  one, two = (tmp_path_factory.mktemp(f'hosts{hosts}') / 'run' for hosts in (1, 2))
  return {1: (one, tiny.train(one, tiny.changed(train__steps=3)), tiny.train(one)),
          2: (two, run_hosts(two, '--config.train.steps=3'),
              run_hosts(two, '--config.mesh.tensor=2'))}


def losses(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['loss'] for line in lines if line['split'] == 'train' and line['task'] == 'all']


def test_two_hosts_train_as_one(runs):
  one, two = (losses(runs[hosts][0]) for hosts in (1, 2))
  assert len(one) == 6
  np.testing.assert_allclose(two, one, rtol=1e-4)
  assert runs[2][2]['resumed_from'] == 3
  a, b = (tiny.restored(runs[hosts][0]) for hosts in (1, 2))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
               a.params, b.params)


def test_two_hosts_count_every_example_once(runs):
  for part in (1, 2):  # hosts with examples of their own, then hosts that share all
    one, two = (runs[hosts][part]['evaluation']['vqa'] for hosts in (1, 2))
    assert two['examples'] == one['examples'] == tiny.get_config().data.eval_examples
    assert two['accuracy'] == one['accuracy']
