"""Padding has no effect: a picture in a larger input gives the same results as alone."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest
import tiny
import torch

from xmodal.data.example import Example, Object
from xmodal.data.pictures.augmentation import Placement
from xmodal.data.pipeline import BadPictures, BatchMaker
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.tokenizer import train_tokenizer
from xmodal.models.cross_modal import CrossModal
from xmodal.models.joint import SumPool
from xmodal.models.padding import Padding
from xmodal.models.towers.resnet import ResNet
from xmodal.models.towers.vgg import VGG
from xmodal.models.towers.vit import ViT
from xmodal.pretrained.tensors import init_shapes
from xmodal.tasks.objects import Objects
from xmodal.train import build
from xmodal.train.plan import Plan


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_like(shapes):
  """Variables of these shapes, without the seconds of compiling module.init."""
  leaves, tree = jax.tree.flatten(shapes)
  return tree.unflatten([np.abs(random(*x.shape, seed=i)) / 4 for i, x in enumerate(leaves)])


@pytest.mark.parametrize('size', [(32, 48), (224, 224), (50, 33)])
@pytest.mark.parametrize('step', [1, 2, 8, 16])
def test_the_mask_is_torchs_nearest_interpolation(size, step):
  rng = np.random.default_rng(0)
  extent = rng.integers(1, np.array(size) + 1, (20, 2)).astype(np.int32)
  pixels = torch.zeros(20, 1, *size)
  for mask, (height, width) in zip(pixels, extent):
    mask[0, :height, :width] = 1
  for rounded in (np.floor_divide, lambda side, step: -(-side // step)):
    grid = tuple(int(rounded(side, step)) for side in size)
    expected = torch.nn.functional.interpolate(pixels, grid)[:, 0].bool()
    found = Padding(extent, size).mask(grid)
    np.testing.assert_array_equal(found, expected)
    assert found[:, 0, 0].all()


# Towers

CANVAS, INNER = (32, 48), (16, 32)
VIT = dict(patch_size=8, hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=2)
TOWERS = {
    'vit': lambda size: ViT(**VIT, image_size=size, num_registers=1),
    'vit with a stem of convolutions': lambda size: ViT(
        **VIT, image_size=size, stem='conv', use_cls_token=False),
    'resnet with batch norm': lambda size: ResNet('bottleneck', (1, 1), (16, 32), 8),
    'resnet with group norm': lambda size: ResNet(
        'basic', (2, 1), (8, 16), 8, norm='group', stem='small'),
    'resnet in training': lambda size: ResNet(
        'basic', (1, 1), (8, 16), 8, frozen_statistics=False),
    'vgg': lambda size: VGG((2, 2), (8, 16), batch_norm=True),
}


def tokens_of(features, grid):
  """Splits tokens or a feature map: those without position, and the rest [B, rows, columns, D]."""
  if features.ndim == 4:
    return features[:, :0, 0], features
  extra = features.shape[1] - grid[0] * grid[1]
  return features[:, :extra], features[:, extra:].reshape(len(features), *grid, -1)


@pytest.mark.parametrize('name', TOWERS)
def test_a_tower_sees_a_picture_in_an_input_as_it_sees_it_alone(name):
  images, junk = random(2, *INNER, 3), 100 * random(2, *CANVAS, 3, seed=1)
  padded = junk.copy()
  padded[:, :INNER[0], :INNER[1]] = images
  extent = np.array([INNER, INNER], np.int32)
  whole, alone = TOWERS[name](CANVAS), TOWERS[name](INNER)
  variables = random_like(init_shapes(whole, padded))
  own = jax.tree.map(lambda x: x, variables)
  if 'vit' in name:
    table = own['params']['position_embedding']
    extra, grid = table[:-24], table[-24:].reshape(4, 6, -1)[:2, :4]
    own['params']['position_embedding'] = np.concatenate([extra, grid.reshape(8, -1)])

  def run(module, variables, images, *extent):
    return module.apply(variables, images, *extent, deterministic='training' not in name,
                        mutable=['batch_stats'])

  def run_padded(images):
    features, updated = run(whole, variables, images, extent)
    extra, grid = tokens_of(features, (4, 6))
    rows, columns = (side * inner // canvas
                     for side, inner, canvas in zip(grid.shape[1:3], INNER, CANVAS))
    seen = extra, grid[:, :rows, :columns]
    return sum((x ** 3).sum() for x in seen), (*seen, updated)

  (_, found), gradient = jax.jit(jax.value_and_grad(run_padded, has_aux=True))(padded)
  features, updated = jax.jit(lambda: run(alone, own, images))()
  for a, b in zip(jax.tree.leaves(found),
                  jax.tree.leaves((*tokens_of(features, (2, 4)), updated)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  is_picture = np.zeros(CANVAS, bool)
  is_picture[:INNER[0], :INNER[1]] = True
  assert gradient[:, is_picture].any() and not gradient[:, ~is_picture].any()


# Cross-modal layers and the sum over tokens


@pytest.mark.parametrize('variant', ['co_attention', 'merged'])
def test_masked_image_tokens_are_as_if_not_there(variant):
  layers = CrossModal(variant, hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=2)
  vision, text = random(2, 7, 16), random(2, 5, 16, seed=1)
  text_mask, vision_mask = np.arange(5) < [[5], [3]], np.arange(7) < [[4], [4]]
  pool = SumPool()
  params = random_like(jax.eval_shape(lambda: layers.init(
      jax.random.key(0), vision, text, text_mask, deterministic=True)))
  pool_params = random_like(jax.eval_shape(
      lambda: pool.init(jax.random.key(0), vision, text, text_mask)))

  @jax.jit
  def run(vision, vision_mask):
    seen, read = layers.apply(params, vision, text, text_mask, vision_mask, deterministic=True)
    return seen[:, :4], read, pool.apply(pool_params, seen, read, text_mask, vision_mask)

  for masked, dropped in zip(run(vision, vision_mask), run(vision[:, :4], None), strict=True):
    np.testing.assert_allclose(masked, dropped, rtol=1e-4, atol=1e-4)


# The objects' loss


def test_the_loss_of_objects_is_that_of_the_tokens_that_are_picture():
  task = Objects(train_tokenizer(['cat', 'dog'], 100), ['cat', 'dog'], max_objects=4)
  example = Example(np.zeros((40, 60, 3), np.uint8),
                    objects=(Object('cat', (1, 2, 10, 10)), Object('dog', (45, 25, 15, 15))))
  logits = random(1, 2, 3, 2)
  padded = np.full((1, 4, 4, 2), -np.inf, np.float32)
  padded[:, :2, :3] = logits

  def loss(placement, logits):
    features = jax.tree.map(lambda x: x[None], task.encode(example, placement))
    return jax.value_and_grad(lambda x: task.losses(x, features)['names'][0])(logits)

  inside = Placement.of_part((40, 60), (0, 0, 60, 40), (0, 0, 60, 40), (80, 80))
  expected, expected_gradient = loss(Placement(60, 40), logits)
  found, gradient = loss(inside, padded)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient[:, :2, :3], expected_gradient, rtol=1e-6)
  assert not np.delete(gradient, np.s_[:2], axis=1).any() and not gradient[:, :, 3:].any()
  broken = np.where(np.arange(2) == 0, padded, np.nan)
  assert np.isnan(loss(inside, broken)[0])  # diverged predictions are not padding


# The whole model


@pytest.fixture(scope='module')
def examples():
  """Wide and high pictures, none near square."""
  source = Shapes('train', size=6, image_size=32)
  return [dataclasses.replace(source[i], image=source[i].image[:height, :width])
          for i, (height, width) in enumerate(
              [(20, 32), (9, 32), (32, 14), (16, 32), (23, 32), (32, 20)])]


@pytest.mark.parametrize('tower, variant', [('vit', 'co_attention'), ('resnet', 'merged')])
def test_what_is_in_the_padding_changes_nothing(examples, tower, variant):
  sizes = () if tower == 'vit' else ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')
  c = tiny.changed(**{f'model__vision__{size}': None for size in sizes},
                   model__vision__name=tower, model__cross__variant=variant,
                   vqa__generation_weight=0.5)
  tokenizer, tasks = build.learn(c, examples)
  model = build.make_model(c, tokenizer, tasks)
  batch = BatchMaker(examples, tasks, (32, 32), BadPictures(6, 0.0), keep_aspect=True)(
      np.arange(6), np.arange(6))
  rows, columns = np.ogrid[:32, :32]
  is_picture = (rows < batch['extent'][:, :1, None]) & (columns < batch['extent'][:, 1:, None])
  assert not batch['image'][~is_picture].any()
  junk = np.random.default_rng(0).integers(0, 256, batch['image'].shape).astype(np.uint8)
  scrawled = {**batch, 'image': np.where(is_picture[..., None], batch['image'], junk)}
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
      lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
      jax.eval_shape(lambda: model.init(jax.random.key(0), batch, deterministic=True)))

  def losses(variables, batch):
    outputs = model.apply(variables, batch, deterministic=True)
    values = {name: task.losses(outputs[name], batch[name]) for name, task in tasks.items()}
    return sum(x.sum() for x in jax.tree.leaves(values)), values

  @jax.jit
  def run(variables, batch):
    if tower == 'vit':
      (_, values), gradients = jax.value_and_grad(losses, has_aux=True)(variables, batch)
      return values, gradients
    return losses(variables, batch)[1], model.apply(variables, batch, method='predict')

  expected = run(variables, batch)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
  jax.tree.map(np.testing.assert_array_equal, run(variables, scrawled), expected)
  # Noise on the first picture itself changes much.
  scrawled['image'] = np.where(np.arange(6).reshape(6, 1, 1, 1) == 0, junk, batch['image'])
  for task, term in (('vqa', 'cls'), ('vqa', 'gen'), ('objects', 'names')):
    change = np.abs(run(variables, scrawled)[0][task][term] - expected[0][task][term])
    assert change[0] > 1e-3 and not change[1:].any()

  # Positions outside all pictures receive no gradient; the others do.
  if tower == 'vit':
    learned = expected[1]['params']['backbone']['vision_tower']['position_embedding'].any(-1)
    reached = is_picture[:, ::8, ::8].any(0)
    np.testing.assert_array_equal(learned.reshape(4, 4), reached)
    assert not reached.all()


def test_a_run_gives_its_model_the_extent_of_each_picture(examples, tmp_path):
  for split in ('train', 'val'):
    lines = []
    for i, example in enumerate(examples):
      Image.fromarray(example.image).save(tmp_path / f'{i}.png')
      objects = [{'name': o.name, 'box': o.box} for o in example.objects]
      lines.append(json.dumps({'image': f'{i}.png', 'question': example.question,
                               'answers': example.answers, 'objects': objects}))
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  run = Plan(tiny.changed(data__source='jsonl', data__root=str(tmp_path), data__keep_aspect=True),
            str(tmp_path / 'run'))
  assert run.batch['extent'].shape == (8, 2)
  for split in ('train', 'eval'):
    batch = run.maker(split)(np.arange(6), np.arange(6))
    assert batch['extent'].tolist() == [[20, 32], [9, 32], [32, 14], [16, 32], [23, 32], [32, 20]]
