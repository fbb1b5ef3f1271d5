"""The benchmarks of the server, for a moment each."""

import re

import numpy as np
import pytest
from served import make_run

from xmodal.bench import serve, soak, torch_serve
from xmodal.data.pictures import images
from xmodal.serve.engine import Picture, Request
from xmodal.serve.trained_engine import TrainedEngine


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('bench') / 'run', ('vqa',))


def test_rows_of_the_bare_loop_and_of_clients(run, capsys):
  assert serve.main(['--checkpoint', run, '--clients', '1', '3', '--seconds', '0.3', '--sizes',
                     '2', '4']) == 0
  head, _, *rows = capsys.readouterr().out.splitlines()
  assert head.startswith('vqa, ') and 'start to ready' in head
  names = [re.split(r'\s{2,}', row)[0] for row in rows]
  assert names == ['bare loop, batch 2', 'with pictures, batch 2', 'bare loop, batch 4',
                   'with pictures, batch 4', 'batches, 1 clients', 'batches, 3 clients',
                   'one by one, 1 clients', 'one by one, 3 clients']
  assert all(float(row.split()[-2]) > 0 for row in rows)


def test_pytorch_answers_the_same(tmp_path):
  sizes = [f'model.{part}.{key}={value}' for part in ('vision', 'text', 'cross') for key, value in (
      ('hidden_dim', 24), ('mlp_dim', 32), ('num_heads', 4), ('num_layers', 1))]
  folder = serve.untrained(str(tmp_path / 'run'), 'small', [
      *sizes, 'data.image_size=32', 'model.text.head_dim=6'])
  pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  requests = [Request((Picture(b'', images.decode(one, (32, 32))),), text, details=True)
              for one, text in zip(pixels, ('what is it?', 'how many?', 'is it red?'))]
  ours, theirs = (engine.answer('vqa', requests) for engine in (
      TrainedEngine(folder, (4,), 'ours'), torch_serve.TorchEngine(folder, (4,))))
  for a, b in zip(ours, theirs):
    assert [name for name, _ in a['top']] == [name for name, _ in b['top']]
    np.testing.assert_allclose(*([p for _, p in one['top']] for one in (a, b)), rtol=1e-3)
  assert len({answer['probability'] for answer in ours}) == 3


def test_a_short_soak_finds_no_fault(run, capsys):
  soak.main(['--checkpoint', run, '--minutes', '0.1', '--clients', '4', '--sizes', '2'])
  out = capsys.readouterr().out
  assert 'fault' not in out and 'exit code 0' in out and re.search(r'\d+ hostile', out)


def test_an_unknown_task_is_one_line(run, capsys):
  assert serve.main(['--checkpoint', run, '--task', 'no']) == 2
  assert capsys.readouterr().err.startswith('error: --task no: wanted one of vqa, ')
