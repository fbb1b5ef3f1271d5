"""The benchmarks at small size: they run, compare equal models, and print parsable tables."""

import importlib.util
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal.bench import (
  attention,
  data,
  detection,
  evaluation,
  generate,
  gpu,
  latency,
  mfu,
  predict,
  same_losses,
  sharding,
  start,
  torch_detection,
  torch_reference,
  train_step,
)
from xmodal.bench.torch_optimizer import make_optimizer
from xmodal.tasks.vqa import VQA
from xmodal.train import build
from xmodal.train.optimizer.optimizer import decays

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
  """main asserts equal losses at step 2, which cover gradients, clipping and AdamW."""
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
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert train_step.main(['--size', 'small', '--batch', '4', '--rounds', '2', *TINY]) == 0
  assert table(capsys.readouterr().out, 's/step').keys() == {'ours'}


def test_weight_decay_of_the_torch_counterpart_is_of_the_same_parameters():
  config = train_step.make_config('small', 4, TINY)
  reference = torch_reference.Reference(config, 90, 20, 0)
  optimizer = make_optimizer(reference, config.optimizer, torch_reference.decays)
  for group in optimizer.param_groups:
    for parameter in group['params']:
      parameter.data.fill_(group['weight_decay'] > 0)
  tokenizer = types.SimpleNamespace(vocab_size=90, pad_id=0, eos_id=1)
  task = VQA(tokenizer, [str(i) for i in range(20)], question_length=24, answer_length=6,
             generation_weight=0.5)
  model = build.make_model(config, tokenizer, {'vqa': task})
  batch = jax.tree.map(lambda x: x[:1], train_step.make_batch(config))
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch, deterministic=True)['params'])
  decayed = torch_reference.parameters_for_ours(reference, model, shapes)
  assert len(jax.tree.leaves(decayed)) > 50
  jax.tree.map(lambda theirs, ours: np.testing.assert_array_equal(theirs, float(ours)),
               decayed, decays(shapes))


def test_the_torch_counterpart_computes_in_the_dtype_of_the_config():
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    config = train_step.make_config('small', 4, [*TINY, f'model.dtype={dtype}'])
    ways = train_step.make_ways(('eager',), config, train_step.make_batch(config))
    losses[dtype] = float(ways['eager']()[0])
  assert losses['bfloat16'] != losses['float32'] == pytest.approx(losses['bfloat16'], rel=0.02)


@pytest.mark.parametrize('arguments, message', [
    (['--ways', 'theirs'], 'theirs'), (['model.nothing=3'], 'model.nothing'),
    (['--size', 'tiny'], 'tiny'), (['--size', 'huge'], 'huge'),
    (['--threads', '0'], '--threads=0'), (['--rounds', '0'], '--rounds=0'),
    (['train.accumulation=2'], 'train.accumulation=2: the benchmark does not apply it'),
    (['train.ema_decay=0.9'], 'train.ema_decay=0.9: the benchmark does not apply it'),
    (['vqa.classifier=False'], 'vqa.classifier=False: the benchmark does not apply it'),
    (["mixer.tasks=('objects',)"], "mixer.tasks=('objects',): the benchmark does not apply it"),
    (['train.batch_size=8'], '--batch sets the batch size'),
    (['--size', 'small', 'model.remat=full'], 'remat=full'),
    (['mesh.fsdp=2'], 'mesh.fsdp=2: PyTorch is measured on one device')])
def test_train_step_says_what_it_cannot_measure(capsys, arguments, message):
  assert train_step.main([*arguments, 'data.image_size=32']) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


def test_latency_is_of_equal_models(capsys):
  assert latency.main(['--size', 'small', '--rounds', '2', *TINY]) == 0
  rows = table(capsys.readouterr().out, 's/step')
  assert rows.keys() == {'ours', 'eager'} and rows['eager'][-1] > 0


def test_mfu_counts_the_steps_of_a_config(capsys):
  assert mfu.main(['--config', tiny.__file__, '--rounds', '1', '--steps', '1']) == 0
  head, row = capsys.readouterr().out.splitlines()
  _, params, batch, seconds, rate, *_ = row.split()
  assert batch == '8' and float(rate) == pytest.approx(8 / float(seconds), rel=0.1)
  assert 'MFU' in head and params.endswith('M')


@pytest.mark.parametrize('bench, arguments, message', [
    (mfu, ['model.nothing=3'], 'model.nothing=3: not a config value'),
    (mfu, ['--config', 'nothing'], 'nothing'), (mfu, ['--batch', '0'], '--batch=0: wanted 1'),
    (gpu, ['--cases', 'vqa huge'], "no case 'vqa huge'"),
    (sharding, ['--cases', 'vqa-huge'], "no case 'vqa-huge'"),
    (evaluation, ['--questions', '0'], '--questions=0: wanted 1'),
    (start, ['--config', 'nothing', '--rounds', '1'], 'nothing'),
    (evaluation, ['--devices', '0'], '--devices=0: wanted 1'),
    (attention, [], 'the kernels are those of an NVIDIA GPU')])
def test_benchmarks_say_what_they_cannot_measure(capsys, bench, arguments, message):
  assert bench.main(arguments) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


@pytest.mark.parametrize('function, found, message', [
    ('device_count', 8, 'found 8: show one'), ('default_backend', 'tpu', 'JAX computes on a tpu')])
def test_both_are_measured_on_one_device(capsys, monkeypatch, function, found, message):
  monkeypatch.setattr(jax, function, lambda: found)
  assert train_step.main(['--size', 'small']) == 2
  error, = capsys.readouterr().err.splitlines()
  assert message in error and '--ways ours' in error


def test_data_measures_both_ways_for_each_size(capsys):
  assert data.main(['--pictures', '64', '--sizes', '64x48', '40x40', '--rounds', '2']) == 0
  rows = table(capsys.readouterr().out, 'size')
  assert rows.keys() == {'64x48', '40x40'}
  for density, *figures in rows.values():
    assert density > 0.1 and len(figures) == 6 and min(figures) > 0


@pytest.mark.parametrize('arguments, message', [
    (['--sizes', '640x480', '640'], '--sizes 640: wanted WIDTHxHEIGHT'),
    (['--sizes', '0x480'], '--sizes 0x480: wanted'), (['--rounds', '0'], '--rounds=0: wanted 1'),
    (['--pictures', '31'], '--pictures=31: wanted 32')])
def test_data_says_what_it_cannot_measure(capsys, arguments, message):
  assert data.main(arguments) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


def test_generate_lets_both_write_the_same(capsys):
  assert generate.main(['--size', 'tiny', '--batches', '1', '3', '--beams', '1', '2', '--tokens',
                        '5', '--prompt', '4', '--rounds', '2']) == 0
  header, *lines = capsys.readouterr().out.splitlines()[1:]
  assert header.split() == ['batch', 'beams', 'ours', 'transformers', 'ours/', 'lowest', 'highest',
                            'equal', '(tokens/s)']
  rows = [list(map(float, line.split())) for line in lines]
  assert [row[:2] for row in rows] == [[1, 1], [1, 2], [3, 1], [3, 2]]
  for *_, ours, theirs, ratio, lowest, highest, equal in rows:
    assert ours > 0 < theirs and lowest <= ratio <= highest
    assert equal == 1


def test_generate_without_torch_measures_ours_alone(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)  # any import of it fails
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert generate.main(['--size', 'tiny', '--batches', '2', '--beams', '1', '--tokens', '3',
                        '--rounds', '2']) == 0
  said, _, _, row = capsys.readouterr().out.splitlines()
  assert 'torch is not installed' in said and len(row.split()) == 3


@pytest.mark.parametrize('arguments, message', [
    (['--size', 'huge'], '--size=huge: wanted one of tiny, small, base'),
    (['--beams', '1', '0'], '--beams=0: wanted 1 or more'),
    (['--tokens', '0'], '--tokens=0: wanted 1'), (['--ways', 'theirs'], '--ways=theirs: wanted'),
    (['--threads', '0'], '--threads=0')])
def test_generate_says_what_it_cannot_measure(capsys, arguments, message):
  assert generate.main(arguments) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


def test_detection_measures_both_ways_with_the_same_weights(capsys):
  """main asserts equal logits and boxes."""
  assert detection.main(['--size', 'tiny', '--pixels', '64x96', '--rounds', '1']) == 0
  output = capsys.readouterr().out
  model = torch_detection.make_model(*detection.SIZES['tiny'])
  trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
  assert f' {trained:,} of them trained' in output
  train, infer = output[output.index('   train '):].split('   infer ')
  for rows in table(train, 'pictures/s'), table(infer, 'pictures/s'):
    assert rows.keys() == {'ours', 'eager'}
    (ours,), (theirs, *ratios) = rows.values()
    assert ratios == pytest.approx([ours / theirs] * 3, rel=0.02)  # of the one round


def test_detection_without_torch_has_a_model_of_the_same_size(monkeypatch):
  batch = detection.make_batch(2, (64, 96), 7, 20)
  model = torch_detection.make_model(*detection.SIZES['tiny'])
  monkeypatch.setitem(sys.modules, 'torch', None)  # any import of it fails
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  names = detection.chosen_ways('ours,eager', train_step.WAYS)
  ours, = detection.make_ways(names, 'tiny', configs.base(), batch).values()
  assert ours.num_parameters[1] == sum(x.numel() for x in model.parameters() if x.requires_grad)
  logits, boxes = ours.infer()
  assert logits.shape == (2, 20, 8) and np.ptp(boxes) > 0


@pytest.mark.parametrize('arguments, message', [
    (['--size', 'huge'], '--size=huge: wanted one of r50, tiny'),
    (['--pixels', '640'], '--pixels=640: wanted HEIGHTxWIDTH'),
    (['--pixels', '16x64'], '--pixels=16x64: wanted'), (['--rounds', '0'], '--rounds=0: wanted 1'),
    (['--ways', 'theirs'], '--ways=theirs: wanted some of'), (['--threads', '0'], '--threads=0')])
def test_detection_says_what_it_cannot_measure(capsys, arguments, message):
  assert detection.main(arguments) == 2
  error, = capsys.readouterr().err.splitlines()
  assert error.startswith('error: ') and message in error


def test_predict_tells_a_first_question_from_those_after_it(finished, capsys):
  arguments = ['--checkpoint', str(finished), '--tasks', 'objects', '--rounds', '2']
  assert predict.main(arguments) == 0
  rows = table(capsys.readouterr().out, 'task')
  assert rows.keys() == {'objects'}
  first, second, median, slowest = rows['objects']
  assert first > 0 and second <= slowest and median <= slowest
  assert predict.main([*arguments[:2], '--tasks', 'detection']) == 2
  assert '--tasks detection: wanted some of vqa, objects' in capsys.readouterr().err


def test_evaluation_is_of_every_question_on_all_devices():
  run = subprocess.run(
      [sys.executable, '-m', evaluation.__name__, '--config', tiny.__file__, '--questions', '43',
       '--devices', '2', '--steps', '4'], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  head, *rows = run.stdout.splitlines()[-3:]
  assert head.startswith('2 devices') and head.endswith('batch 8')
  training, rate, _, ratio = (float(x) for row in rows for x in re.findall(r'\d+\.\d+', row))
  assert 'of 43 in' in rows[1]
  assert ratio == pytest.approx(rate / training, abs=0.02)


def test_starts_are_measured_cold_and_warm(capsys):
  assert start.main(['--config', tiny.__file__, '--rounds', '1', "mixer.tasks=('objects',)",
                     'mixer.weights=(1.0,)']) == 0
  rows = table(capsys.readouterr().out, 'until')
  assert rows.keys() == {'cold', 'warm'}
  assert all(0 < spent and 0 < seconds for seconds, spent in rows.values())


def test_trees_are_compared_by_the_metrics_that_both_log():
  old, new = {'step': 1, 'loss': 0.5}, {'step': 1, 'loss': 0.5, 'update_norm': 1.0}
  assert same_losses.difference([old], [new]) == same_losses.difference([new], [old]) == ''
  found = same_losses.difference([old], [{**new, 'loss': 0.25}])
  assert found.startswith('first at step 1: loss 0.5 before, 0.25 after')
