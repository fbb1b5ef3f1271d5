"""Both benchmarks, small: they run, they compare like with like, and their tables can be read."""

import sys

import pytest

from xmodal.bench import data, train_step

TINY = [f'model.{tower}.{key}={value}' for tower in ('vision', 'text', 'cross')
        for key, value in (('hidden_dim', 32), ('mlp_dim', 48), ('num_heads', 4),
                           ('num_layers', 1))]
TINY += ['data.image_size=32', 'model.vision.patch_size=8', 'model.text.head_dim=6',
         'model.text.num_decoder_layers=1', 'vqa.generation_weight=0.5']


def table(output, header):
  """{first word: the numbers after it} of the lines below a header."""
  lines = output[output.index(header):].splitlines()[1:]
  return {line.split()[0]: list(map(float, line.split()[1:])) for line in lines}


def test_train_step_and_its_torch_counterpart_learn_alike(capsys):
  """Equal losses at step 2 hold gradients, clipping and AdamW; main asserts them."""
  assert train_step.main(['--size', 'small', '--batch', '4', '--rounds', '2',
                          '--ways', 'ours,eager', *TINY]) == 0
  rows = table(capsys.readouterr().out, 's/step')
  assert rows.keys() == {'ours', 'eager'}
  for seconds, fastest, slowest, examples_per_second, *_ in rows.values():
    assert 0 < fastest <= seconds <= slowest
    assert examples_per_second == pytest.approx(4 / seconds, rel=0.1)
  assert rows['eager'][4] > 0


def test_train_step_without_torch_measures_ours_alone(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)  # any import of it fails
  monkeypatch.setattr(train_step.importlib.util, 'find_spec', lambda name: None)
  assert train_step.main(['--size', 'small', '--batch', '4', '--rounds', '2', *TINY]) == 0
  assert table(capsys.readouterr().out, 's/step').keys() == {'ours'}


@pytest.mark.parametrize('arguments, message', [
    (['--ways', 'theirs'], 'theirs'), (['model.nothing=3'], 'model.nothing'),
    (['--size', 'tiny'], 'tiny'), (['--size', 'huge'], 'huge'),
    (['--threads', '0'], '--threads=0')])
def test_train_step_says_what_it_cannot_measure(capsys, arguments, message):
  assert train_step.main([*arguments, 'data.image_size=32']) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


def test_data_measures_both_ways_for_each_size(capsys):
  data.main(['--pictures', '64', '--sizes', '64x48', '40x40', '--rounds', '2'])
  rows = table(capsys.readouterr().out, 'size')
  assert rows.keys() == {'64x48', '40x40'}
  for density, *figures in rows.values():
    assert density > 0.1 and len(figures) == 6 and min(figures) > 0
