"""Parts of the towers: attention against PyTorch, and modules in training mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xmodal import target
from xmodal.bench.parity_vision import randomise
from xmodal.errors import UserError
from xmodal.models import attention as kernels
from xmodal.models.attention import MultiHeadAttention, attention
from xmodal.models.layers import remat_policy
from xmodal.models.towers.resnet import ResNet
from xmodal.models.towers.vgg import VGG
from xmodal.models.towers.vit import ViT
from xmodal.pretrained.tensors import init_shapes

torch.set_num_threads(2)
wants_gpu = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='wants an NVIDIA GPU')


def assert_close(ours, theirs, tolerance=1e-5):
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def random_variables(module, images):
  """Like module.init, without the seconds that compiling it takes."""
  shapes, tree = jax.tree.flatten(init_shapes(module, images))
  return tree.unflatten([np.abs(random_heads(*s.shape, seed=i)) / 4 for i, s in enumerate(shapes)])


# Attention


def random_heads(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('mask_shape', [(2, 3, 5, 7), (2, 1, 1, 7), (5, 7)])
def test_attention_equals_torch_with_any_mask_and_bias(mask_shape):
  query, key, value = (random_heads(2, n, 3, 8, seed=s) for s, n in enumerate((5, 7, 7)))
  bias = random_heads(1, 3, 5, 7)
  mask = random_heads(*mask_shape) > 0
  mask[..., 0] = True
  ours = attention(query, key, value, bias=bias, mask=mask, scale=0.7)
  heads_first = [torch.tensor(x).transpose(1, 2) for x in (query, key, value)]
  theirs = torch.nn.functional.scaled_dot_product_attention(
      *heads_first, scale=0.7,
      attn_mask=torch.tensor(bias).masked_fill(~torch.tensor(mask), -torch.inf))
  assert_close(ours, theirs.transpose(1, 2))


def test_attention_of_16_bits_rounds_neither_logits_nor_softmax():
  """With logits of tens, where 16-bit rounding changes a weight by several percent."""
  query, key, value = (jnp.asarray(size * random_heads(2, n, 3, 88, seed=s), jnp.bfloat16)
                       for s, (n, size) in enumerate(((40, 6), (50, 6), (50, 1))))
  ours = attention(query, key, value)
  assert ours.dtype == jnp.bfloat16
  theirs = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(np.asarray(x, np.float32)).transpose(1, 2) for x in (query, key, value)))
  assert_close(np.asarray(ours, np.float32), theirs.transpose(1, 2), tolerance=0.006)


@pytest.mark.parametrize('implementation, dtype', [
    ('xla', 'float32'), ('xla', 'bfloat16'),
    pytest.param('cudnn', 'bfloat16', marks=wants_gpu)])
def test_query_without_keys_gives_zeros_and_finite_gradients(implementation, dtype):
  query, key, value = (jnp.asarray(random_heads(2, 3, 2, 8, seed=s), dtype) for s in range(3))
  mask = np.ones((2, 1, 3, 3), bool)
  mask[1, :, 2] = False

  def total(*qkv):
    output = attention(*qkv, mask=mask, implementation=implementation)
    return jnp.sum(output ** 2), output

  gradients, output = jax.grad(total, (0, 1, 2), has_aux=True)(query, key, value)
  assert not output[1, 2].any() and output[1, 1].any() and output[0, 2].any()
  for gradient in gradients:
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_attention_dropout_drops_the_stated_share_and_keeps_the_mean():
  query = key = np.zeros((1, 64, 1, 8), np.float32)
  value = np.ones((1, 64, 1, 8), np.float32)
  output = attention(query, key, value, dropout_rate=0.25, dropout_rng=jax.random.key(0))
  assert abs(output.mean() - 1) < 0.05
  kept = output[0, :, 0, 0] * 0.75
  assert 0.6 < kept.min() < 0.75 < kept.max() < 0.9


@pytest.mark.parametrize('backend, dtype, head_dim, asked, message', [
    ('cpu', 'bfloat16', 8, {'implementation': 'flash'}, 'unknown'),
    ('cpu', 'bfloat16', 8, {}, 'the device is a cpu, an NVIDIA GPU is wanted'),
    ('gpu', 'float32', 8, {}, 'dtype is float32'),
    ('gpu', 'bfloat16', 12, {}, 'head_dim is 12'),
    ('gpu', 'bfloat16', 8, {'dropout_rate': 0.1}, 'dropout_rate is 0.1')])
def test_kernel_that_cannot_compute_it_says_so(
    monkeypatch, backend, dtype, head_dim, asked, message):
  monkeypatch.setattr(target, 'platform', lambda: backend)
  x = jnp.asarray(random_heads(1, 2, 1, head_dim), dtype)
  with pytest.raises(UserError, match=message):
    attention(x, x, x, **{'implementation': 'cudnn'} | asked)


@pytest.mark.parametrize('platform, keys, dtype, head_dim, dropout_rate, kernel', [
    ('gpu', 196, 'bfloat16', 64, 0.0, 'cudnn'), ('gpu', 196, 'float32', 64, 0.0, 'xla'),
    ('gpu', 32, 'bfloat16', 64, 0.0, 'xla'), ('gpu', 196, 'bfloat16', 12, 0.0, 'xla'),
    ('gpu', 196, 'bfloat16', 64, 0.1, 'xla'), ('cpu', 196, 'bfloat16', 64, 0.0, 'xla'),
    ('tpu', 196, 'bfloat16', 64, 0.0, 'xla')])
def test_auto_takes_cudnn_where_it_can_and_pays(
    monkeypatch, platform, keys, dtype, head_dim, dropout_rate, kernel):
  taken = []
  monkeypatch.setattr(target, 'platform', lambda: platform)
  for name in ('xla', 'cudnn'):
    monkeypatch.setattr(kernels, f'_{name}',
                        lambda query, *_, name=name: taken.append(name) or query)
  x = jnp.zeros((1, keys, 2, head_dim), dtype)
  attention(x, x, x, dropout_rate=dropout_rate, implementation='auto')
  assert taken == [kernel]


@pytest.mark.parametrize('platform, policy', [('cpu', 'none'), ('gpu', 'dots'), ('tpu', 'dots')])
def test_auto_recomputes_on_accelerators(monkeypatch, platform, policy):
  monkeypatch.setattr(target, 'platform', lambda: platform)
  assert remat_policy('auto') == policy and remat_policy('full') == 'full'


@wants_gpu
@pytest.mark.parametrize('lengths', [(64, 48), (33, 47)])
@pytest.mark.parametrize('given', ['nothing', 'mask', 'bias', 'mask and bias'])
def test_cudnn_and_its_gradients_equal_xla(lengths, given):
  arrays = {name: jnp.asarray(random_heads(2, n, 4, 64, seed=s), jnp.bfloat16)
            for s, (name, n) in enumerate(zip(('query', 'key', 'value'), (*lengths, lengths[1])))}
  if 'bias' in given:
    arrays['bias'] = random_heads(1, 4, *lengths)
  mask = np.arange(lengths[1]) < np.array([lengths[1], 9]).reshape(2, 1, 1, 1)

  def run(implementation):
    def total(arrays):
      output = attention(**arrays, mask=mask if 'mask' in given else None,
                         implementation=implementation)
      return jnp.sum(output.astype(jnp.float32) ** 2), output
    return jax.jit(jax.grad(total, has_aux=True))(arrays)

  for ours, plain in zip(jax.tree.leaves(run('cudnn')), jax.tree.leaves(run('xla')), strict=True):
    assert_close(np.asarray(ours, np.float32), np.asarray(plain, np.float32), tolerance=0.03)


def test_multi_head_attention_equals_torch():
  theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, kdim=10, vdim=10)
  names = {'query': 'q_proj_weight', 'key': 'k_proj_weight', 'value': 'v_proj_weight'}
  randomise(theirs)
  state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
  biases = np.split(state['in_proj_bias'], 3)
  params = {ours: {'kernel': state[name].T, 'bias': bias}
            for (ours, name), bias in zip(names.items(), biases)}
  params['out'] = {'kernel': state['out_proj.weight'].T, 'bias': state['out_proj.bias']}
  inputs, context = random_heads(2, 5, 12), random_heads(2, 7, 10)
  mask = np.arange(7)[None] < np.array([[7], [4]])
  ours = MultiHeadAttention(3, 4, 12).apply(
      {'params': params}, inputs, context, mask=mask[:, None, None, :])
  context = torch.tensor(context)
  assert_close(ours, theirs(torch.tensor(inputs), context, context,
                            key_padding_mask=~torch.tensor(mask))[0])


# ViT


def test_vit_gradients_are_the_same_however_layers_are_run():
  images = random_heads(2, 4, 8, 3)
  fields = dict(patch_size=2, hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=2,
                image_size=(4, 8), stem='conv', use_cls_token=False)
  params = random_variables(ViT(**fields), images)

  def gradient(**how):
    module = ViT(**fields, **how)
    assert jax.eval_shape(module.apply, params, images).shape == (2, 8, 16)
    return jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, images) ** 3)))(params)

  plain, other = gradient(), gradient(remat='dots', scan_unroll=2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, other)
  with pytest.raises(UserError, match='remat'):
    gradient(remat='some')


def test_vit_refuses_pictures_of_another_size():
  module = ViT(8, 16, 32, 2, 1, (16, 32))
  with pytest.raises(UserError, match=r'\(32, 16, 3\)'):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 16, 3)))


# All


@pytest.mark.parametrize('module', [
    ViT(8, 16, 32, 2, 2, (16, 16)), ViT(8, 16, 32, 2, 2, (16, 16), stem='conv'),
    ViT(8, 16, 32, 2, 2, (16, 16), num_registers=2, swiglu=True, layer_scale=0.1),
    ResNet('bottleneck', (1, 1), (16, 32)), ResNet('basic', (1,), (16,), norm='group'),
    VGG((1, 1), (8, 8), batch_norm=True)])
def test_bfloat16_computes_in_bfloat16_on_float32_parameters(module):
  def run():
    images = jnp.zeros((1, 16, 16, 3))
    half = module.clone(dtype=jnp.bfloat16)
    variables = half.init(jax.random.key(0), images)
    return half.apply(variables, images), variables

  output, variables = jax.eval_shape(run)
  assert output.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize('module', [
    ResNet(block='basic', stage_sizes=(1, 1), widths=(8, 16), embedding_size=8, stem='small'),
    VGG((1,), (16,), batch_norm=True)])
def test_running_statistics_move_only_when_asked(module):
  images = 3 + random_heads(4, 16, 16, 3)
  variables = random_variables(module, images)
  for frozen in (True, False):
    module = module.clone(frozen_statistics=frozen)
    features, updated = jax.jit(lambda v, module=module: module.apply(
        v, images, deterministic=False, mutable=['batch_stats']))(variables)
    assert features.shape == (4, 8, 8, 16)
    moved = [not np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(updated), jax.tree.leaves(variables['batch_stats']), strict=True)]
    assert not any(moved) if frozen else all(moved)


def test_vgg_refuses_pictures_that_it_would_pool_away():
  with pytest.raises(UserError, match=r'\(64, 31\).* 32 or more'):
    jax.eval_shape(VGG((1, 1, 1, 1, 1)).init, jax.random.key(0), jnp.zeros((1, 64, 31, 3)))
