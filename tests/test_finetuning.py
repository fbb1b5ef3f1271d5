"""Freezing, learning rates by tower and depth, and low-rank adapters."""

import functools
import json
import shutil
import sys

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import run_alone, three_steps
from test_step import Regression, a_batch
import tiny

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.models import lora
from xmodal.predictor import Predictor
from xmodal.sharding.rules import path_name
from xmodal.train.checkpoints import checkpoint
from xmodal.train.describe import describe
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.optimizer.rates import rates
from xmodal.train.plan import Plan
from xmodal.train.steps import state as states
from xmodal.train.steps.frozen import frozen_names
from xmodal.train.steps.step import make_train_step


def flat(tree):
  return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def changed_names(new, old):
  new, old = flat(new), flat(old)
  assert new.keys() == old.keys()
  return {name for name in new if new[name].tobytes() != old[name].tobytes()}


# Freezing, on two linear layers


class TwoLayers(nn.Module):

  @nn.compact
  def __call__(self, batch, *, deterministic):
    x = nn.tanh(nn.Dense(7, name='lower')(batch['image']))
    return {'task': nn.Dense(1, name='upper')(x)[:, 0]}


@functools.cache
def two_layers(pattern='', **options):
  """A new state and its uncompiled step; parameters that match the pattern are frozen."""
  model = TwoLayers()
  variables = states.variables_fn(model, a_batch(), 0)
  params = jax.eval_shape(variables)['params']
  frozen = frozen_names(pattern, params)
  # Clipping takes effect, so that the test shows which norm is used.
  c = tiny.changed(optimizer__clip_norm=0.01, optimizer__weight_decay=0.5).optimizer
  optimizer = make_optimizer(c, optax.constant_schedule(0.1), params)
  init = states.init_fn(variables, optimizer, 0, options.get('ema_decay', 0) > 0, frozen)
  step = make_train_step(model, {'task': Regression()}, {'task': 1.0}, optimizer, frozen=frozen,
                         **options)
  return jax.jit(init)(), step


def test_what_is_frozen_keeps_its_bits_and_has_no_optimizer_state():
  state, step = two_layers('lower', ema_decay=0.5)
  new, metrics = jax.jit(step)(state, a_batch())
  assert changed_names(new.params, state.params) == {'upper/kernel', 'upper/bias'}
  assert changed_names(new.ema, state.ema) == {'upper/kernel', 'upper/bias'}
  moments = optax.tree.get(new.opt_state, 'mu'), optax.tree.get(new.opt_state, 'nu')
  assert all(flat(moment).keys() == {'upper/kernel', 'upper/bias'} for moment in moments)
  # The other layer trains as if the optimizer had no other parameters.
  x = np.tanh(a_batch()['image'] @ state.params['lower']['kernel'] + state.params['lower']['bias'])
  y, counts = a_batch()['task']['y'], a_batch()['task']['counts']

  def alone(upper):
    error = (x @ upper['kernel'])[:, 0] + upper['bias'] - y
    return (error ** 2).mean() + 0.5 * (jnp.abs(error) * counts).sum() / counts.sum()

  upper = state.params['upper']
  grads = jax.grad(alone)(upper)
  np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(grads), rtol=1e-5)
  adam = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(
      0.1, b1=0.9, b2=0.98, weight_decay=0.5, mask={'kernel': True, 'bias': False}))
  updates, _ = adam.update(grads, adam.init(upper), upper)
  for name, x in optax.apply_updates(upper, updates).items():
    np.testing.assert_allclose(new.params['upper'][name], x, rtol=1e-4, atol=1e-6)


def test_no_gradient_of_frozen_kernels_is_computed():
  def products(pattern):
    state, step = two_layers(pattern)
    return str(jax.make_jaxpr(step)(state, a_batch())).count('dot_general')

  # Two forward; then one for each kernel's gradient, and one for the input of the upper layer.
  assert (products(''), products('lower'), products('upper')) == (5, 3, 4)


def test_accumulation_with_frozen_parameters_equals_the_large_batch():
  (state, whole), (_, parts) = (two_layers('upper', accumulation=n, ema_decay=0.5) for n in (1, 2))
  expected, metrics = jax.jit(whole)(state, a_batch())
  found, part_metrics = jax.jit(parts)(state, a_batch())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               (expected.params, expected.ema, metrics), (found.params, found.ema, part_metrics))
  assert changed_names(found.params, state.params) == {'lower/kernel', 'lower/bias'}


@pytest.mark.parametrize('key, pattern, message', [
    ('optimizer.frozen', 'vision_towr',
     "frozen='vision_towr' matches no parameter.*backbone/text_tower"),
    ('optimizer.frozen', '/', "frozen='/' leaves no parameter to train"),
    ('optimizer.frozen', '(', r"frozen='\(' is no regular expression"),
    ('model.lora.pattern', '[', r"lora.pattern='\[' is no regular expression"),
    ('model.lora.pattern', 'embedding', "pattern='embedding' matches no kernel.*/kernel"),
])
def test_patterns_that_cannot_be_meant_are_named(key, pattern, message):
  c = tiny.changed(**{key.replace('.', '__'): pattern})
  with pytest.raises(UserError, match=message) as raised:
    Plan(c, 'unused')
  assert '\n' not in str(raised.value)


def test_a_pattern_that_would_freeze_adapters_is_named():
  names = {'backbone': {'text_tower': {'out': {'kernel': 0, 'lora_a': 0, 'lora_b': 0}}}, 'head': 0}
  with pytest.raises(UserError, match='matches the adapter backbone/text_tower/out/lora_a'):
    frozen_names('text_tower', names)


# Learning rates


def one_number_each(c):
  """A tree with the model's names; each leaf has one number per stacked layer, or one."""
  params = Plan(c, 'unused').abstract.params
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: rng.normal(size=x.shape[0] if 'layers/' in path_name(path) else 1
                                 ).astype(np.float32), params)


def unstacked(params):
  """Splits stacked layers into one leaf each: .../layers/3/...."""
  leaves = {}
  for name, x in traverse_util.flatten_dict(params, sep='/').items():
    if 'layers/' in name:
      before, after = name.split('layers/')
      leaves |= {f'{before}layers/{i}/{after}': x[i:i + 1] for i in range(len(x))}
    else:
      leaves[name] = x
  return leaves


def test_rates_equal_separate_optimizers_of_unstacked_layers():
  c = tiny.changed(model__vision__num_layers=3, model__text__num_layers=2,
                   model__text__num_decoder_layers=4, optimizer__vision_rate=0.5,
                   optimizer__text_rate=2.0, optimizer__layer_decay=0.7,
                   optimizer__clip_norm=1.0, optimizer__weight_decay=0.3)
  params = one_number_each(c)
  # Powers of the decay: index of the first entry that occurs in the name.
  powers = {'vision': [('stem/', 4), ('position_embedding', 4), ('layers/0/', 3), ('layers/1/', 2),
                       ('layers/2/', 1), ('final_norm', 0)],
            'text': [('token_embedding', 5), ('encoder_layers/0/', 2), ('encoder_layers/1/', 1),
                     ('decoder_layers/0/', 4), ('decoder_layers/1/', 3), ('decoder_layers/2/', 2),
                     ('decoder_layers/3/', 1), ('relative_bias', 0), ('_norm/', 0), ('lm_head', 0)]}

  def rate(name):
    for tower, factor in (('vision', 0.5), ('text', 2.0)):
      if name.startswith(f'backbone/{tower}_tower/'):
        return 0.01 * factor * 0.7 ** next(n for part, n in powers[tower] if part in name)
    return 0.01

  names = unstacked(params)
  labels = {name: rate(name) for name in names}
  assert len(set(labels.values())) == 5 + 6 + 1

  def adamw(rate):
    return optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.3, mask=lambda tree: {
        name: name.endswith(('kernel', 'token_embedding/embedding')) for name in tree})

  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(
      {rate: adamw(rate) for rate in set(labels.values())}, labels))
  ours = make_optimizer(c.optimizer, optax.constant_schedule(0.01), params)
  start = params
  (state, their_state), their_params = (ours.init(params), theirs.init(names)), names
  update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
  rng = np.random.default_rng(1)
  for _ in range(3):
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, their_state = their_update(unstacked(grads), their_state, their_params)
    their_params = optax.apply_updates(their_params, updates)
  found, first = unstacked(params), unstacked(start)
  for name, x in their_params.items():
    np.testing.assert_allclose(found[name] - first[name], x - first[name], rtol=1e-3, atol=1e-6,
                               err_msg=name)


def test_blocks_of_convolutions_are_layers():
  c = tiny.changed(model__vision__name='resnet', optimizer__layer_decay=0.5)
  for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
    c.model.vision[key] = None
  found = rates(c.optimizer, one_number_each(c))
  tower = {name.removeprefix('backbone/vision_tower/'): float(x)
           for name, x in found.items() if 'vision_tower' in name}
  assert tower['stem/kernel'] == tower['stem_norm/scale'] == 0.5 ** 4
  assert tower['stage1_block1/conv1/kernel'] == tower['stage1_block1/shortcut/kernel'] == 0.5 ** 3
  assert tower['stage3_block1/conv2_norm/bias'] == 0.5
  assert found['heads_vqa/answers/kernel'] == found['backbone/vision_projection/kernel'] == 1


@pytest.mark.parametrize('key, value', [('vision_rate', 0.0), ('text_rate', -1.0),
                                        ('layer_decay', 0.0), ('layer_decay', 1.1)])
def test_rates_that_cannot_be_are_named(key, value):
  with pytest.raises(UserError, match=f'config.optimizer.{key}={value}'):
    configs.check(tiny.changed(**{f'optimizer__{key}': value}))


# Adapters, in the whole model


def adapted():
  # Five layers are a loop, which compiles faster than two unrolled layers.
  return tiny.changed(
      mixer__tasks=('vqa',), mixer__weights=(1.0,),
      model__lora__pattern='text_tower/.*/(query|value)/kernel|stem/conv2/kernel|lm_head|answers',
      model__lora__rank=3, model__text__num_layers=5,
      train__ema_decay=0.5, optimizer__layer_decay=0.8, optimizer__frozen='pool|grid_position')


# The parameters that the patterns above freeze and train.
LEARNS = ('/lora_a', '/lora_b')
FROZEN = ('backbone/vision_tower/', 'backbone/text_tower/', 'backbone/pool/',
          'backbone/grid_position/', 'heads_vqa/answers/kernel')


@pytest.fixture(scope='module')
def run():
  return Plan(adapted(), 'unused')


@pytest.fixture(scope='module')
def base():
  """The same model without adapters."""
  c = adapted()
  c.model.lora.pattern = ''
  return Plan(c, 'unused')


@pytest.fixture(scope='module')
def batch(base):
  return base.maker('eval')(np.arange(4), np.arange(4))


@pytest.fixture(scope='module')
def outputs(run, base, batch):
  """Compiled functions of parameters, with and without adapters: decoded text, and logits."""
  def of(model):
    # The same program as in Predictor.
    predict = jax.jit(lambda variables, batch: model.apply(variables, batch, method='predict'))
    logits = jax.jit(lambda params: model.apply({'params': params}, batch, deterministic=True))
    return lambda params: (predict({'params': params}, batch), logits(params))
  return of(run.model), of(base.model)


def randomised(params):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), params)


def without_adapters(params):
  flat = traverse_util.flatten_dict(params, sep='/')
  return traverse_util.unflatten_dict(
      {name: x for name, x in flat.items() if not lora.is_adapter(name)}, sep='/')


def test_a_model_with_adapters_begins_as_the_model_without(run, base, outputs):
  with_adapters, without = (jax.jit(x.init)().params for x in (run, base))
  plain = {name: x for name, x in flat(with_adapters).items() if not lora.is_adapter(name)}
  assert plain.keys() == flat(without).keys()
  assert all((plain[name] == x).all() for name, x in flat(without).items())
  # Most kernels that write into the residual stream start at zero, so random ones test more.
  params = randomised(with_adapters)
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: np.zeros_like(x) if path_name(path).endswith('lora_b') else x, params)
  bare = without_adapters(params)
  # XLA may order the sums of two programs differently, so rounding differs.
  for a, b in zip(jax.tree.leaves(outputs[0](params)), jax.tree.leaves(outputs[1](bare)),
                  strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_merged_parameters_give_the_same_outputs(run, outputs):
  params = randomised(run.abstract.params)
  merged = lora.merge(params, run.config.model.lora)
  assert not any(map(lora.is_adapter, flat(merged)))
  (decoded, logits), (their_decoded, their_logits) = outputs[0](params), outputs[1](merged)
  for a, b in zip(jax.tree.leaves((logits, decoded)),
                  jax.tree.leaves((their_logits, their_decoded)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
  # If adapters had no effect, in cached decoding or elsewhere, merging would change results.
  bare = without_adapters(params)
  for a, b in zip(jax.tree.leaves(outputs[1](bare)[1]), jax.tree.leaves(logits), strict=True):
    assert np.linalg.norm(a - b) > 1e-2 * np.linalg.norm(b)


class Adapted(nn.Module):

  @nn.compact
  def __call__(self, x, *, deterministic):
    with lora.adapters(lora.Lora('kernel', rank=2, dropout_rate=0.5), deterministic=deterministic):
      return nn.Dense(3, name='layer')(x)


def test_dropout_is_of_the_adapters_input_in_training_alone():
  x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  layer = randomised(Adapted().init(jax.random.key(0), x, deterministic=True))['params']['layer']

  def output(seed, deterministic=False, **changed):
    return Adapted().apply({'params': {'layer': {**layer, **changed}}}, x,
                           deterministic=deterministic, rngs={'dropout': jax.random.key(seed)})

  assert (output(0) != output(1)).all() and (output(0) == output(0)).all()
  assert (output(0, deterministic=True) == output(1, deterministic=True)).all()
  # The kernel's own input is unaffected.
  without = dict(lora_b=np.zeros_like(layer['lora_b']))
  np.testing.assert_array_equal(output(0, **without), output(0, deterministic=True, **without))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir trained with adapters in one go: checkpoints of steps 3 and 6."""
  workdir = tmp_path_factory.mktemp('adapters') / 'run'
  tiny.train(workdir, adapted())
  return workdir


def test_training_changes_adapters_and_what_lies_outside_the_towers(run, trained):
  first, state = jax.jit(run.init)(), stored(run, trained)
  moved = changed_names(state.params, first.params)
  names = set(flat(first.params))
  frozen = {name for name in names if name.startswith(FROZEN) and not name.endswith(LEARNS)}
  assert moved <= names - frozen
  # Only biases of keys have no gradient.
  assert {name for name in names - frozen - moved if not name.endswith('key/bias')} == set()
  assert changed_names(state.ema, first.ema) == moved
  assert flat(optax.tree.get(state.opt_state, 'mu')).keys() == names - frozen == names - run.frozen


def stored(run, workdir):
  """The state of the newest checkpoint."""
  checkpoints = checkpoint.Checkpoints(str(workdir), keep=5)
  state = checkpoints.restore(run.abstract, pytest.fail)
  checkpoints.close()
  return state


def test_a_run_with_adapters_goes_on_bit_for_bit(run, trained, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  tiny.train(workdir, adapted())
  jax.tree.map(np.testing.assert_array_equal, stored(run, workdir), stored(run, trained))
  assert json.loads((workdir / 'final.json').read_text())['resumed_from'] == 3


def test_prediction_from_a_checkpoint_has_adapters(run, base, trained, outputs):
  predictor = Predictor(str(trained))
  examples = [base.feeds[0].sources['eval'][i] for i in range(4)]  # as in the fixture `batch`
  expected = outputs[1](lora.merge(stored(run, trained).ema, run.config.model.lora))[0]['vqa']
  for found, answer in zip(predictor(examples, 'vqa')[1], base.tasks['vqa'].decode(expected),
                           strict=True):
    assert [name for name, _ in found.top] == [name for name, _ in answer.top]
    np.testing.assert_allclose([p for _, p in found.top], [p for _, p in answer.top], rtol=1e-4)
    np.testing.assert_allclose(found.written[1], answer.written[1], rtol=1e-4)


def test_the_table_of_a_dry_run_says_what_is_frozen(run):
  lines = describe(run).splitlines()
  rows = {line.split()[0]: line for line in lines[1:lines.index('')]}
  assert {name for name, row in rows.items() if row.endswith('frozen')} == run.frozen
  params = flat(jax.tree.map(lambda x: np.zeros(x.shape, bool), run.abstract.params))
  trained = sum(x.size for name, x in params.items() if name not in run.frozen)
  total = sum(x.size for x in params.values())
  assert f'{trained:,} of {total:,} parameters are trained' in lines


def test_adapters_on_eight_devices_learn_as_on_one(tmp_path):
  one = three_steps((1, 1, 1), tmp_path / 'one.npz', adapted())
  eight = run_alone(__file__, tmp_path / 'eight.npz')
  for a, b in zip(one['metrics'], eight['metrics'], strict=True):
    assert b == pytest.approx(a, rel=2e-4, abs=1e-5)
  assert eight['held'] < 0.5
  one, eight = np.load(tmp_path / 'one.npz'), np.load(tmp_path / 'eight.npz')
  assert set(one) == set(eight)
  for name in one:
    size, error = np.linalg.norm(one[name]), np.linalg.norm(eight[name] - one[name])
    if not name.endswith('key/bias'):  # no gradient but rounding
      assert error <= (1e-5 if name.startswith('gradient') else 0.1) * size, name
    if name.startswith('gradient') and name.endswith(LEARNS):
      assert size > 0, name


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps(three_steps((2, 2, 2), sys.argv[1], adapted())))
