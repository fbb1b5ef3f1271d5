"""Structured pruning: what stays computes the same, and importance is a derivative."""

import re

from flax import traverse_util
import jax
import numpy as np
import pytest
import tiny

from xmodal import prune
from xmodal.data.example import Example
from xmodal.models import pruning
from xmodal.predictor import Predictor

SLOTS = {'vision': 'backbone/vision_tower/', 'text': 'backbone/text_tower/',
         'cross': 'backbone/cross_modal/'}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with two layers in each stack, whose gates have left zero."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  sizes = {f'model__{slot}__num_layers': 2 for slot in SLOTS}
  tiny.train(workdir, tiny.changed(
      model__text__num_decoder_layers=2, optimizer__learning_rate=0.02, train__samples=0, **sizes))
  return workdir


@pytest.fixture(scope='module')
def model(run):
  return prune.Trained(str(run / 'checkpoints' / '6'))


@pytest.fixture(scope='module')
def modules(model):
  return model.modules()


@pytest.fixture(scope='module')
def importance(model, modules):
  return model.importance(modules, 2)


def test_every_attention_and_mlp_is_found(modules):
  assert {(m.slot, m.path.removeprefix(SLOTS[m.slot])) for m in modules} == {
      *(('vision', f'layers/{name}') for name in ('attention', 'mlp')),
      *(('text', f'encoder_layers/{name}') for name in ('attention', 'mlp')),
      *(('text', f'decoder_layers/{name}') for name in ('attention', 'cross_attention', 'mlp')),
      *(('cross', f'layers/{stream}_{name}') for stream in ('vision', 'text')
        for name in ('cross', 'self', 'mlp'))}
  assert all(m.units == (2 if m.has_heads else 32) for m in modules)


def scaled(params, module, layer, unit, factor):
  """The parameters in which the output of one unit is multiplied."""
  name = f'{module.path}/{"out" if module.has_heads else "down"}/kernel'
  kernel = params[name]
  rows = kernel.shape[1] // module.units
  rows = slice(unit * rows, (unit + 1) * rows)
  return {**params, name: kernel.at[layer, rows].multiply(factor)}


def test_importance_is_the_derivative_by_a_factor_on_a_unit(model, modules, importance):
  plan = model.plan
  batch = plan.stream('train').at(('vqa', 'objects'), plan.sampling, 0, 8)
  kind = plan.sampling.kinds[0]

  @jax.jit
  def loss(params):
    outputs = plan.model.apply({'params': traverse_util.unflatten_dict(params, sep='/')}, batch,
                               deterministic=True)
    total = 0.0
    for name in kind.tasks:
      task, features = plan.tasks[name], batch[name]
      features = {'vocabulary': task.vocabulary(), **features}
      weights = task.weights(features)
      total += sum(task.loss_weights[term] * (values * weights[term]).sum() / weights[term].sum()
                   for term, values in task.losses(outputs[name], features).items())
    return total

  del importance  # of several batches; here of the first
  found = model.importance(modules, 1)
  checked = 0
  for module in modules:
    for layer, unit in ((0, 0), (1, 1)):
      change = loss(scaled(model.params, module, layer, unit, 1.02)) - loss(
          scaled(model.params, module, layer, unit, 0.98))
      np.testing.assert_allclose(found[module.path][layer, unit], abs(change) / 0.04,
                                 rtol=0.05, atol=2e-4)
      checked += found[module.path][layer, unit] > 1e-3
  assert checked > 5


@pytest.mark.parametrize('heads, width', [(0.5, 0.4), (1.0, 0.1), (0.5, 1.0)])
def test_the_rest_computes_as_if_what_went_gave_zero(model, modules, importance, heads, width):
  chosen = pruning.choose(importance, modules, model.params, heads=heads, width=width)
  kept = pruning.cut(model.params, modules, chosen)
  zeroed = model.params
  for module in modules:
    for layer, units in enumerate(chosen.units[module.path]):
      for unit in set(range(module.units)) - set(units.tolist()):
        zeroed = scaled(zeroed, module, layer, unit, 0)
  config, towers = model.resized(modules, chosen)
  plan = model.plan
  small = prune.build.make_model(config, plan.tokenizer, plan.tasks, towers)
  batch = plan.stream('eval').filler(('vqa', 'objects'))
  batch['image'] = np.random.default_rng(0).integers(0, 256, batch['image'].shape, np.uint8)

  def answers(model, params):
    return model.apply({'params': traverse_util.unflatten_dict(params, sep='/')}, batch,
                       deterministic=True)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               answers(small, kept), answers(plan.model, zeroed))
  assert sum(x.size for x in kept.values()) < sum(x.size for x in model.params.values())


def test_layers_of_a_stack_share_their_heads_where_they_share_a_bias(model, modules, importance):
  chosen = pruning.choose(importance, modules, model.params, heads=0.5, width=1)
  units = chosen.units['backbone/text_tower/encoder_layers/attention']
  assert (units == units[0]).all()


def test_the_best_units_stay():
  module = pruning.Module('m/layers/mlp', 'm/layers', 'vision', False, 4)
  scores = {'m/layers/mlp': np.array([[1., 9, 3, 4], [9, 1, 2, 8]])}
  chosen = pruning.choose(scores, [module], {}, heads=1, width=0.5)
  assert chosen.units['m/layers/mlp'].tolist() == [[1, 3], [0, 3]]
  chosen = pruning.choose(scores, [module], {}, heads=1, width=1, layers=0.5)
  assert chosen.layers['m/layers'].tolist() == [1]


def test_a_pruned_run_is_a_checkpoint(run, tmp_path, capsys):
  output = tmp_path / 'small'
  assert prune.main(['--checkpoint', str(run), '--output', str(output), '--keep', '0.8',
                     '--layers', '0.5', '--batches', '1']) == 0
  said = capsys.readouterr().out
  assert 'num_layers 2 -> 1' in said and f'--config.train.start_from={output}' in said
  whole, small = Predictor(str(run)), Predictor(str(output))
  sizes = [sum(x.size for x in jax.tree.leaves(p.variables)) for p in (small, whole)]
  assert 0.5 < sizes[0] / sizes[1] <= 0.8
  picture = np.zeros((32, 32, 3), np.uint8)
  assert small([Example(picture, question='what is it?')], 'vqa')[1][0].answer
  # Once more, of what was pruned already.
  assert prune.main(['--checkpoint', str(output), '--output', str(tmp_path / 'smaller'), '--keep',
                     '0.9', '--batches', '1']) == 0


@pytest.mark.parametrize('arguments, wanted', [
    (['--keep', '1.5'], '--keep is 1.5, wanted above 0, at most 1'),
    (['--layers', '0'], '--layers is 0.0, wanted above 0, at most 1'),
    (['--batches', '0'], '--batches is 0, wanted 1 or more'),
    (['--keep', '0.05'], r'--keep 0.05: with one head and one unit in each layer, \d+% of the '
                         'parameters are left'),
])
def test_what_cannot_be_done_is_one_line(run, tmp_path, capsys, arguments, wanted):
  output = tmp_path / 'small'
  assert prune.main(['--checkpoint', str(run), '--output', str(output), *arguments]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ')
  assert re.search(wanted, lines[0])
  assert not output.exists()


def test_an_output_in_use_stays(run, tmp_path, capsys):
  (tmp_path / 'file').write_text('mine')
  assert prune.main(['--checkpoint', str(run), '--output', str(tmp_path)]) == 2
  assert 'is not empty; give a new folder' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['file']
