"""Sizes, dropout and rematerialisation of each tower; errors for those without effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal.data.example import Example
from xmodal.errors import UserError
from xmodal.models.cross_modal import CrossModal
from xmodal.models.denoiser.denoiser import Denoiser
from xmodal.models.detector.queries import LearnedQueries
from xmodal.models.towers.bert import Bert
from xmodal.models.towers.gpt2 import Gpt2
from xmodal.models.towers.resnet import ResNet
from xmodal.models.towers.t5 import T5
from xmodal.models.towers.vgg import VGG
from xmodal.models.towers.vit import ViT
from xmodal.train import build
from xmodal.train.plan import Plan

SIZES = dict(hidden_dim=16, mlp_dim=24, num_heads=2, num_layers=1)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS, MASK = np.arange(2, 12).reshape(2, 5), np.ones((2, 5), bool)
STREAM = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)
# A module of each kind, and its inputs.
TOWERS = {
    'vit': (ViT(8, **SIZES, image_size=(16, 16)), (IMAGES,)),
    'resnet': (ResNet('basic', (1, 1), (8, 16), 8, norm='group'), (IMAGES,)),
    'resnet_batch': (ResNet('bottleneck', (1, 1), (8, 16), 8, frozen_statistics=False), (IMAGES,)),
    'vgg': (VGG((1, 2), (4, 8), batch_norm=True, frozen_statistics=False), (IMAGES,)),
    't5': (T5(20, head_dim=8, num_decoder_layers=1, **SIZES), (TOKENS, MASK, TOKENS)),
    'bert': (Bert(20, **SIZES), (TOKENS, MASK)),
    'gpt2': (Gpt2(20, **SIZES), (TOKENS, MASK)),
    'co_attention': (CrossModal('co_attention', **SIZES), (STREAM, STREAM, MASK)),
    'merged': (CrossModal('merged', **SIZES), (STREAM, STREAM, MASK)),
    'denoiser': (Denoiser(patch_size=8, image_size=(16, 16), bottleneck_dim=8, **SIZES),
                 (IMAGES, np.array([0.2, 0.7], np.float32), STREAM, MASK)),
    'queries': (LearnedQueries(16, 24, 2, 8, 0.0, 'xla', jnp.float32, num_queries=3, num_layers=1),
                (STREAM, MASK))}


def traced(name):
  """(function (params, deterministic, **fields) -> scalar, shapes of params) of one of TOWERS."""
  module, inputs = TOWERS[name]
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, deterministic=True))

  def loss(params, deterministic=False, statistics=shapes.get('batch_stats', {}), **fields):
    zeros = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), statistics)
    outputs, _ = module.clone(**fields).apply(
        {'params': params, 'batch_stats': zeros}, *inputs, deterministic=deterministic,
        rngs={'dropout': jax.random.key(3)}, mutable=['batch_stats'])
    return sum((x ** 2).mean() for x in jax.tree.leaves(outputs))

  return loss, shapes['params']


def program(loss, shapes, **arguments):
  return str(jax.make_jaxpr(jax.grad(lambda params: loss(params, **arguments)))(shapes))


@pytest.mark.parametrize('name', TOWERS)
def test_dropout_and_remat_are_honoured(name):
  loss, shapes = traced(name)
  for arguments, drops, recomputes in [
      ({}, False, False), ({'dropout_rate': 0.3, 'remat': 'full'}, True, True),
      ({'dropout_rate': 0.3, 'deterministic': True, 'remat': 'dots'}, False, True)]:
    made = program(loss, shapes, **arguments)
    assert ('random_bits' in made, 'remat' in made) == (drops, recomputes)
  with pytest.raises(UserError, match="remat policy 'most' is unknown"):
    program(loss, shapes, remat='most')


@pytest.mark.parametrize('name', ['resnet', 'vgg', 'queries'])
def test_recomputation_changes_no_number(name):
  loss, shapes = traced(name)
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(2)
  params = tree.unflatten([np.asarray(rng.normal(size=s.shape) / 4, np.float32) for s in leaves])

  @jax.jit
  def gradients(params):
    return [jax.value_and_grad(functools.partial(loss, remat=remat, dropout_rate=0.3))(params)
            for remat in ('none', 'full')]

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
               *gradients(params))


def test_a_run_gives_them_to_all_towers():
  options = dict(model__dropout_rate=0.1, model__remat='full')
  nothing = {f'model__vision__{key}': None for key in SIZES}
  example = Example(np.zeros((4, 4, 3), np.uint8), question='is it red?', answers=('red',))
  for values in ({}, {'model__vision__name': 'resnet', **nothing},
                 {'model__vision__name': 'vgg', **nothing, 'model__text__name': 'gpt2',
                  'model__text__head_dim': None, 'model__text__num_decoder_layers': 3}):
    config = tiny.changed(**options, **values, mixer__tasks=('vqa',), mixer__weights=(1.0,))
    backbone = build.make_model(config, *build.learn(config, [example])).backbone
    towers = [backbone.vision_tower, backbone.text_tower, backbone.cross_modal]
    if backbone.decoder_tower is not None:
      towers.append(backbone.decoder_tower)
      assert backbone.decoder_tower.num_decoder_layers == 3
    assert all((tower.dropout_rate, tower.remat) == (0.1, 'full') for tower in towers)
  assert len(towers) == 4


@pytest.mark.parametrize('values, words', [
    *(({f'model__{tower}__{key}': value}, rf'config.model.{tower}.{key}={value}: wanted '
       + ('2 or more' if (tower, key) == ('cross', 'hidden_dim') else '1 or more'))
      for tower in ('vision', 'text', 'cross', 'denoiser')
      for key, value in (('num_heads', 0), ('hidden_dim', -1), ('num_layers', 0), ('mlp_dim', 0))),
    ({'model__vision__patch_size': 0}, 'config.model.vision.patch_size=0: wanted'),
    ({'model__denoiser__patch_size': -4}, 'config.model.denoiser.patch_size=-4: wanted'),
    ({'model__text__head_dim': 0}, 'config.model.text.head_dim=0: wanted'),
    ({'model__text__num_decoder_layers': 0}, 'config.model.text.num_decoder_layers=0: wanted'),
    ({'model__vision__hidden_dim': 2 ** 31}, 'wanted 1 or more, at most 2.15e.09'),
    ({'model__vision__num_heads': 3}, 'config.model.vision: hidden_dim=16 does not divide into'),
    ({'model__cross__num_heads': 5}, 'config.model.cross: hidden_dim=16 does not divide into'),
    ({'model__cross__hidden_dim': 1, 'model__cross__num_heads': 1}, 'wanted 2 or more')])
def test_sizes_that_mean_nothing(values, words):
  with pytest.raises(UserError, match=words) as error:
    configs.check(tiny.changed(**values))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('values, words', [
    ({'model__vision__patch_size': 64}, r'\(32, 32\) does not divide into patches of 64'),
    ({'data__image_size': 36}, r'\(36, 36\) does not divide into patches of 8'),
    ({'model__remat': 'most'}, "config.model.remat='most': wanted auto, none, full or dots")])
def test_sizes_that_do_not_fit_the_pictures(values, words):
  with pytest.raises(UserError, match=words):
    Plan(tiny.changed(**values), 'unused')


@pytest.mark.parametrize('name, field, value', [
    ('vit', 'num_heads', 0), ('vit', 'patch_size', 0), ('vit', 'image_size', (16, -16)),
    ('vit', 'hidden_dim', 15), ('vit', 'layer_norm_eps', float('nan')),
    ('resnet', 'widths', (8, 0)), ('resnet', 'stage_sizes', (1,)),
    ('resnet_batch', 'widths', (2, 16)), ('vgg', 'widths', (8,)), ('vgg', 'stage_sizes', (0, 1)),
    ('t5', 'num_heads', 0), ('t5', 'num_decoder_layers', -1), ('t5', 'dropout_rate', 1.5),
    ('t5', 'relative_attention_num_buckets', 2), ('t5', 'relative_attention_max_distance', 16),
    ('bert', 'num_heads', 0), ('bert', 'num_token_types', 0), ('bert', 'vocab_size', 2 ** 40),
    ('gpt2', 'num_heads', -2), ('gpt2', 'max_positions', 0), ('co_attention', 'num_heads', 0)])
def test_fields_that_mean_nothing(name, field, value):
  module, inputs = TOWERS[name]
  with pytest.raises(UserError) as error:
    jax.eval_shape(lambda: module.clone(**{field: value}).init(
        jax.random.key(0), *inputs, deterministic=True))
  assert '\n' not in str(error.value)
