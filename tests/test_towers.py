"""The towers against transformers (PyTorch), through the files that it writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention, attention
from xmodal.models.resnet import ResNet
from xmodal.models.vit import ViT
from xmodal.pretrained import resnet, vit

torch.set_num_threads(2)


def randomise(model, scale=0.2):
  """Fresh models have zero biases, unit norms, unit variances: nothing would show."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor += noise.abs() if name.endswith('running_var') else scale * noise
  return model.eval()


def save_and_load(model, folder):
  model.save_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  return config, load_file(folder / 'model.safetensors')


def assert_close(ours, theirs, tolerance=1e-5):
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


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


def test_query_without_keys_gives_zeros_and_finite_gradients():
  query, key, value = (random_heads(2, 3, 2, 8, seed=s) for s in range(3))
  mask = np.ones((2, 1, 3, 3), bool)
  mask[1, :, 2] = False

  def total(*qkv):
    return jnp.sum(attention(*qkv, mask=mask) ** 2)

  output = attention(query, key, value, mask=mask)
  assert not output[1, 2].any() and output[1, 1].any() and output[0, 2].any()
  for gradient in jax.grad(total, (0, 1, 2))(query, key, value):
    assert np.isfinite(gradient).all()


def test_attention_dropout_drops_the_stated_share_and_keeps_the_mean():
  query = key = np.zeros((1, 64, 1, 8), np.float32)
  value = np.ones((1, 64, 1, 8), np.float32)
  output = attention(query, key, value, dropout_rate=0.25, dropout_rng=jax.random.key(0))
  assert abs(output.mean() - 1) < 0.05
  kept = output[0, :, 0, 0] * 0.75
  assert 0.6 < kept.min() < 0.75 < kept.max() < 0.9


@pytest.mark.parametrize('asked, message', [
    ({'implementation': 'cudnn'}, 'float32'), ({'implementation': 'flash'}, 'unknown')])
def test_kernel_that_cannot_compute_it_says_so(asked, message):
  x = random_heads(1, 2, 1, 8)
  with pytest.raises(UserError, match=message):
    attention(x, x, x, **asked)


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


def make_vit(**fields):
  fields = {'hidden_size': 15, 'num_hidden_layers': 2, 'num_attention_heads': 3,
            'intermediate_size': 28, 'image_size': (24, 32), 'patch_size': 8} | fields
  return randomise(transformers.ViTModel(transformers.ViTConfig(**fields)))


@pytest.mark.parametrize('fields', [
    {},
    {'num_attention_heads': 5, 'patch_size': 4, 'hidden_act': 'gelu_new'},
    {'num_attention_heads': 1, 'patch_size': 16, 'image_size': 48, 'layer_norm_eps': 1e-3}])
def test_vit_equals_transformers(tmp_path, fields):
  theirs = make_vit(**fields)
  config, tensors = save_and_load(theirs, tmp_path)
  module = vit.module_from_config(config)
  images = random_heads(2, *module.image_size, 3)
  ours = module.apply(vit.to_flax(tensors, module), images)
  with torch.no_grad():
    assert_close(ours, theirs(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state)


def test_vit_reads_a_classifier_and_refuses_what_does_not_fit(tmp_path):
  fields = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2,
            'intermediate_size': 8, 'image_size': 16, 'patch_size': 8}
  model = transformers.ViTForImageClassification(transformers.ViTConfig(**fields))
  config, tensors = save_and_load(model, tmp_path)
  module = vit.module_from_config(config)
  params = vit.to_flax(tensors, module)['params']
  assert params['layers']['mlp']['up']['kernel'].shape == (1, 8, 8)
  with pytest.raises(UserError, match=r'vit\.layernorm\.bias'):
    vit.to_flax({k: v for k, v in tensors.items() if k != 'vit.layernorm.bias'}, module)
  with pytest.raises(UserError, match=r'vit\.layernorm\.bias is \(7,\), wanted \(8,\)'):
    vit.to_flax(tensors | {'vit.layernorm.bias': np.zeros(7)}, module)
  with pytest.raises(UserError, match='encoder.layer.1'):
    vit.to_flax(tensors | {'vit.encoder.layer.1.output.dense.bias': np.zeros(8)}, module)
  with pytest.raises(UserError, match='qkv_bias'):
    vit.module_from_config(config | {'qkv_bias': False})


@pytest.mark.parametrize('stem', ['patch', 'conv'])
def test_vit_gradients_are_the_same_however_layers_are_run(stem):
  images = random_heads(2, 16, 32, 3)
  fields = dict(patch_size=8, hidden_dim=16, mlp_dim=32, num_heads=2, num_layers=3,
                image_size=(16, 32), stem=stem, use_cls_token=False)
  params = jax.jit(ViT(**fields).init)(jax.random.key(0), images)

  def gradient(**how):
    module = ViT(**fields, **how)
    assert jax.eval_shape(module.apply, params, images).shape == (2, 8, 16)
    return jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, images) ** 3)))(params)

  plain = gradient()
  for other in (gradient(remat='full'), gradient(remat='dots', scan_unroll=3)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, other)
  with pytest.raises(UserError, match='remat'):
    gradient(remat='some')


def test_vit_refuses_pictures_of_another_size():
  module = ViT(8, 16, 32, 2, 1, (16, 32))
  with pytest.raises(UserError, match=r'\(32, 16, 3\)'):
    module.init(jax.random.key(0), jnp.zeros((1, 32, 16, 3)))


# ResNet


@pytest.mark.parametrize('fields', [
    {'layer_type': 'basic'},
    {'layer_type': 'bottleneck'},
    {'layer_type': 'bottleneck', 'downsample_in_bottleneck': True},
    {'layer_type': 'basic', 'downsample_in_first_stage': True}])
def test_resnet_equals_transformers(tmp_path, fields):
  config = transformers.ResNetConfig(
      embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 1], **fields)
  theirs = randomise(transformers.ResNetModel(config))
  config, tensors = save_and_load(theirs, tmp_path)
  module = resnet.module_from_config(config)
  variables = resnet.to_flax(tensors, module)
  images = random_heads(2, 65, 97, 3)
  ours = module.apply(variables, images)
  with torch.no_grad():
    last = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
  assert_close(ours, last.permute(0, 2, 3, 1))


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_resnet_running_statistics_move_only_when_asked(norm):
  images = 3 + random_heads(4, 16, 16, 3)
  fields = dict(block='basic', stage_sizes=(1, 1), widths=(8, 16), embedding_size=8, norm=norm,
                stem='small')
  variables = ResNet(**fields).init(jax.random.key(0), images)
  assert ResNet(**fields).apply(variables, images).shape == (4, 8, 8, 16)
  assert ('batch_stats' in variables) == (norm == 'batch')
  for frozen in (True, False):
    module = ResNet(**fields, frozen_statistics=frozen)
    _, updated = module.apply(variables, images, deterministic=False, mutable=['batch_stats'])
    moved = [not np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(updated), jax.tree.leaves(variables.get('batch_stats', {})))]
    assert all(moved) if norm == 'batch' and not frozen else not any(moved)
