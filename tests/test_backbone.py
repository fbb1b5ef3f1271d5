"""The shared model: each tower runs once, padding has no effect, no parameter is unused."""

import collections
from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal.data.pipeline import BadPictures, BatchMaker
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.models.cross_modal import CrossModal
from xmodal.models.joint import Backbone
from xmodal.models.stream import Stream
from xmodal.sharding.rules import path_name
from xmodal.train import build


@pytest.fixture(scope='module')
def examples():
  source = Shapes('train', size=32, image_size=32)
  return [source[i] for i in range(32)]


def make(examples, **values):
  """The model of a config, and a function that makes its batches."""
  c = tiny.changed(**values)
  configs.check(c)
  tokenizer, tasks = build.learn(c, examples)

  def batch(*records):
    size = (c.data.image_size,) * 2
    return BatchMaker(examples, tasks, size, BadPictures(len(examples), 0.0))(
        np.array(records), np.array(records))

  return build.make_model(c, tokenizer, tasks), batch, tasks


def vision(tower):
  """Config values for a tower; a ResNet does not take the tiny sizes of the ViT."""
  sizes = () if tower == 'vit' else ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')
  return {'model__vision__name': tower, **{f'model__vision__{size}': None for size in sizes}}


def abstract_init(model, batch):
  return jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True))


def random_variables(model, batch):
  """Like model.init, without the seconds of compilation."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
                      abstract_init(model, batch))


def names_of(variables):
  return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]


@pytest.mark.parametrize('tower, variant, heads', [
    ('vit', 'co_attention', 'cls'), ('vit', 'merged', 'gen'), ('resnet', 'co_attention', 'gen'),
    ('resnet', 'merged', 'cls'), ('resnet', 'co_attention', 'cls+gen')])
def test_every_choice_gives_outputs_and_predictions_of_its_heads(examples, tower, variant, heads):
  model, batch, tasks = make(
      examples, **vision(tower), model__cross__variant=variant,
      vqa__classifier='cls' in heads, vqa__generation_weight=0.5 if 'gen' in heads else 0.0)
  batch = batch(0, 1, 2)
  variables = abstract_init(model, batch)
  outputs = jax.eval_shape(lambda v, b: model.apply(v, b, deterministic=True), variables, batch)
  assert set(outputs['vqa']) == set(heads.split('+'))
  assert outputs['objects'].shape == (3, 4, 4, len(tasks['objects'].names))
  if 'cls' in heads:
    assert outputs['vqa']['cls'].shape == (3, len(tasks['vqa'].answers))
  predictions = jax.eval_shape(
      lambda v, b: model.apply(v, b, method='predict'), variables, batch)['vqa']
  assert ('top_index' in predictions) == ('cls' in heads)
  assert ('tokens' in predictions) == ('gen' in heads)
  names = names_of(variables)
  for part, head in (('decoder', 'gen'), ('lm_head', 'gen'), ('answers', 'cls')):
    assert any(part in name for name in names) == (head in heads), part


@pytest.mark.parametrize('method', ['__call__', 'predict'])
def test_each_tower_runs_once_for_pictures_that_tasks_share(examples, method):
  model, batch, _ = make(examples)
  batch = batch(0, 1)
  variables = abstract_init(model, batch)
  calls = collections.Counter()

  def count(next_function, args, kwargs, context):
    calls[context.module.name, context.method_name] += 1
    return next_function(*args, **kwargs)

  with nn.intercept_methods(count):
    options = {'method': method} if method == 'predict' else {'deterministic': True}
    jax.eval_shape(lambda v, b: model.apply(v, b, **options), variables, batch)
  assert calls['vision_tower', '__call__'] == 1
  assert calls['cross_modal', '__call__'] == 1
  assert calls['text_tower', 'encode'] == 2  # questions, and the names of objects


@pytest.mark.parametrize('tower, variant', [('vit', 'co_attention'), ('resnet', 'merged')])
def test_padding_of_the_question_changes_nothing(examples, tower, variant):
  options = {**vision(tower), 'model__cross__variant': variant}
  model, short, _ = make(examples, vqa__question_length=28, **options)
  _, long, _ = make(examples, vqa__question_length=40, **options)
  a, b = short(0, 1), long(0, 1)
  padding = (a['vqa']['question'] == 0).sum(1)
  assert padding.max() > 0 and a['vqa']['question'].shape != b['vqa']['question'].shape
  variables = random_variables(model, a)
  run = jax.jit(lambda v, batch: model.apply(v, batch, deterministic=True))
  before, after = run(variables, a), run(variables, b)
  for head in ('cls', 'gen'):
    np.testing.assert_allclose(after['vqa'][head], before['vqa'][head], rtol=1e-4, atol=1e-4)
  # Far below the effect of one word or another picture.
  other_word = short(0, 1)
  other_word['vqa']['question'][0, 0] -= 1
  other_picture = short(0, 1)
  other_picture['image'][0] = 255 - other_picture['image'][0]
  for changed in (other_word, other_picture):
    change = np.abs(run(variables, changed)['vqa']['cls'] - before['vqa']['cls']).max(1)
    assert change[0] > 1e-2 and change[1] < 1e-4


class Map(nn.Module):
  """A vision tower whose feature map is the picture; `how` changes its output."""

  how: Callable = staticmethod(lambda x: x)

  def __call__(self, images, extent, *, deterministic):
    return self.how(images)


class Ids(nn.Module):
  """A text tower whose tokens are the ids; `how` changes its output."""

  how: Callable = staticmethod(lambda x: x)
  hidden_dim: int = 1

  def encode(self, tokens, mask, *, deterministic):
    return self.how(tokens[..., None].astype(float))


def streams(vision_tower, text_tower):
  backbone = Backbone(vision_tower, text_tower, CrossModal('merged', 8, 8, 1, 1))
  pictures = np.random.default_rng(0).uniform(size=(2, 4, 6, 3)).astype(np.float32)
  texts = np.array([[5, 7, 0], [6, 0, 0]], np.int32)
  return (backbone.apply({}, pictures, deterministic=True, method='vision'),
          backbone.apply({}, texts, deterministic=True, method='text'))


def test_towers_give_streams_or_arrays():
  def stream(x):
    return Stream(x.reshape(2, 24, 3), None, (4, 6))

  arrays = streams(Map(), Ids())
  given = streams(Map(stream), Ids(lambda x: Stream(x, jnp.array([[1, 0, 0], [1, 1, 0]], bool))))
  assert arrays[0].grid == given[0].grid == (4, 6) and given[0].mask is None
  np.testing.assert_array_equal(arrays[0].tokens, given[0].tokens)
  np.testing.assert_array_equal(arrays[1].tokens, given[1].tokens)
  assert arrays[1].mask.tolist() == [[True, True, False], [True, False, False]]
  assert given[1].mask.tolist() == [[True, False, False], [True, True, False]]
  assert streams(Map(stream), Ids(Stream))[1].mask.all()
  with pytest.raises(UserError, match='vision tower Map gives a Stream without a grid'):
    streams(Map(lambda x: Stream(x.reshape(2, 24, 3))), Ids())


def test_unknown_choices_are_named(examples):
  for key, value in (('model__cross__variant', 'both'), ('model__vision__name', 'alexnet'),
                     ('model__size', 'huge'), ('model__dtype', 'float16')):
    with pytest.raises(UserError, match=f'{key.replace("__", ".")}=.{value}.: wanted'):
      make(examples, **{key: value})


def test_a_size_that_a_tower_does_not_have_is_named(examples):
  with pytest.raises(UserError, match='model.vision.hidden_dim=16 means nothing to resnet'):
    make(examples, **{**vision('resnet'), 'model__vision__hidden_dim': 16})
  with pytest.raises(UserError, match='model.text.neighbor_bias=2.0 means nothing to bert'):
    make(examples, model__text__name='bert', model__text__head_dim=None,
         model__text__neighbor_bias=2.0)
