"""Contrastive losses and the pooling before them, against transformers' SigLIP and CLIP."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from xmodal.models.pooling import AttentionPool
from xmodal.tasks.retrieval.losses import LOSSES, matching_pairs, normalise, pair_logits

BATCH, WIDTH = 7, 16
SIZES = dict(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(SIZES, image_size=4, patch_size=4)
MODELS = {
    'sigmoid': (transformers.SiglipModel, transformers.SiglipConfig(
        text_config=dict(SIZES, vocab_size=8), vision_config=VISION)),
    'softmax': (transformers.CLIPModel, transformers.CLIPConfig(
        text_config=dict(SIZES, vocab_size=8), vision_config=VISION, projection_dim=WIDTH))}


class Tower(torch.nn.Module):
  """A stand-in for a tower that returns fixed vectors."""

  def __init__(self, vectors):
    super().__init__()
    self.vectors = torch.nn.Parameter(torch.tensor(vectors))

  def forward(self, *args, **kwargs):
    return transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=self.vectors)


def theirs(loss, image, text, log_scale, bias):
  """Logits [B, B], loss, and its gradients with respect to the four inputs."""
  model_class, config = MODELS[loss]
  model = model_class(config)
  model.vision_model, model.text_model = Tower(image), Tower(text)
  model.visual_projection = model.text_projection = torch.nn.Identity()
  model.logit_scale.data = torch.full_like(model.logit_scale, log_scale)
  inputs = [model.vision_model.vectors, model.text_model.vectors, model.logit_scale]
  if loss == 'sigmoid':
    model.logit_bias.data = torch.full_like(model.logit_bias, bias)
    inputs.append(model.logit_bias)
  out = model(input_ids=torch.zeros(1, 1, dtype=torch.long), pixel_values=torch.zeros(1, 3, 4, 4),
              return_loss=True)
  out.loss.backward()
  return (out.logits_per_image.detach().numpy(), out.loss.item(),
          [x.grad.numpy().reshape(x.shape) for x in inputs])


def mean_loss(loss, inputs, tokens, pictures, valid):
  """The loss as the training step averages it."""
  image, text, *rest = inputs
  logits = pair_logits(normalise(image), normalise(text), *rest)
  of_example = LOSSES[loss](logits, matching_pairs(tokens, pictures, valid), valid)
  return (of_example * valid).sum() / valid.sum()


value_and_gradients = jax.jit(jax.value_and_grad(mean_loss, argnums=1), static_argnums=0)


@pytest.fixture(scope='module')
def vectors():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
  return image, (image + rng.normal(size=image.shape)).astype(np.float32)


DIFFERENT = np.arange(BATCH)
TEXTS = np.stack([DIFFERENT, DIFFERENT % 2], axis=1)


@pytest.mark.parametrize('loss', LOSSES)
def test_logits_loss_and_gradients_are_those_of_transformers(loss, vectors):
  log_scale, bias = (2.0, -1.5) if loss == 'sigmoid' else (3.0, 0.0)
  logits, value, gradients = theirs(loss, *vectors, log_scale, bias)
  inputs = [*vectors, np.float32(log_scale)] + ([np.float32(bias)] if loss == 'sigmoid' else [])
  np.testing.assert_allclose(pair_logits(*map(normalise, vectors), *inputs[2:]), logits, atol=1e-5)
  ours, our_gradients = value_and_gradients(loss, inputs, TEXTS, DIFFERENT, np.ones(BATCH, bool))
  assert float(ours) == pytest.approx(value, rel=1e-5)
  for a, b in zip(our_gradients, gradients, strict=True):
    np.testing.assert_allclose(np.ravel(a), np.ravel(b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('loss', LOSSES)
def test_an_invalid_example_is_neither_positive_nor_negative(loss, vectors):
  """The loss, and every gradient, are those of the batch without it."""
  valid = np.arange(BATCH) != 3
  inputs = [*vectors, np.float32(2.0), np.float32(-1.0)]
  few = [x[valid] if np.ndim(x) else x for x in inputs]
  of_all = value_and_gradients(loss, inputs, TEXTS, DIFFERENT, valid)
  of_few = value_and_gradients(loss, few, TEXTS[valid], DIFFERENT[valid], valid[valid])
  assert float(of_all[0]) == pytest.approx(float(of_few[0]), rel=1e-5)
  for a, b in zip(of_all[1], of_few[1]):
    np.testing.assert_allclose(a[valid] if np.ndim(a) else a, b, rtol=1e-4, atol=1e-6)
    if np.ndim(a):
      assert (a[3] == 0).all()
  none = np.zeros(BATCH, bool)
  logits = pair_logits(*map(normalise, vectors), 2.0)
  assert np.isfinite(LOSSES[loss](logits, matching_pairs(TEXTS, DIFFERENT, none), none)).all()


def test_equal_texts_and_equal_pictures_are_no_negatives(vectors):
  """PyTorch's losses with soft targets for the matching pairs."""
  tokens, pictures = TEXTS.copy(), DIFFERENT.copy()
  tokens[4], pictures[6] = tokens[1], pictures[0]
  match = np.eye(BATCH, dtype=bool)
  match[[1, 4, 0, 6], [4, 1, 6, 0]] = True
  valid = np.ones(BATCH, bool)
  np.testing.assert_array_equal(matching_pairs(tokens, pictures, valid), match)
  logits = np.array(pair_logits(*map(normalise, vectors), 2.0, -1.0))
  there, target = torch.tensor(logits), torch.tensor(match, dtype=torch.float32)
  np.testing.assert_allclose(
      LOSSES['sigmoid'](logits, match, valid),
      torch.nn.functional.binary_cross_entropy_with_logits(there, target, reduction='none').sum(1),
      rtol=1e-5)
  target = target / target.sum(1, keepdim=True)
  both = [torch.nn.functional.cross_entropy(x, target, reduction='none') for x in (there, there.T)]
  np.testing.assert_allclose(LOSSES['softmax'](logits, match, valid), sum(both) / 2, rtol=1e-5)


def test_the_scale_ends_at_100(vectors):
  logits = pair_logits(*map(normalise, vectors), jnp.log(1e4))
  assert 50 < abs(logits).max() <= 100.001


def test_vectors_of_nothing_stay_finite():
  value, gradient = jax.value_and_grad(lambda x: normalise(x).sum())(jnp.zeros((2, 4)))
  assert value == 0 and np.isfinite(gradient).all()


def test_pooling_is_siglips_and_looks_past_padding():
  width, heads = 16, 8
  config = types.SimpleNamespace(hidden_size=width, num_attention_heads=heads, layer_norm_eps=1e-6,
                                 hidden_act='gelu_pytorch_tanh', intermediate_size=4 * width)
  there = transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead(config)
  tokens = np.random.default_rng(0).normal(size=(3, 5, width)).astype(np.float32)
  weights = {k: v.numpy() for k, v in there.state_dict().items()}

  def linear(name):
    return {'kernel': weights[f'{name}.weight'].T, 'bias': weights[f'{name}.bias']}

  parts = (np.split(weights[f'attention.in_proj_{kind}'], 3) for kind in ('weight', 'bias'))
  params = {
      'query_embedding': weights['probe'],
      'attention': {name: {'kernel': kernel.T, 'bias': bias}
                    for name, kernel, bias in zip(('query', 'key', 'value'), *parts)}
                   | {'out': linear('attention.out_proj')},
      'norm': {'scale': weights['layernorm.weight'], 'bias': weights['layernorm.bias']},
      'mlp': {'up': linear('mlp.fc1'), 'down': linear('mlp.fc2')}}
  pool = jax.jit(lambda *inputs: AttentionPool().apply({'params': params}, *inputs))
  expected = there(torch.tensor(tokens)).detach().numpy()
  np.testing.assert_allclose(pool(tokens), expected, atol=1e-5)
  padded = np.concatenate([tokens, np.full((3, 2, width), 9, np.float32)], axis=1)
  mask = np.broadcast_to(np.arange(7) < 5, (3, 7))
  np.testing.assert_allclose(pool(padded, mask), expected, atol=1e-5)
  assert abs(pool(padded) - expected).max() > 0.01
