"""Rounding of weights and activations to integers, judged by PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from xmodal.data.example import Example
from xmodal.errors import UserError
from xmodal.models.quantized import ROUNDINGS, Rounding, product, quantize, rounded
from xmodal.predictor import Predictor


def kernel(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def by_torch(x, scales, largest):
  """Fake quantisation of [I, O] with a scale for each column."""
  return torch.fake_quantize_per_channel_affine(
      torch.tensor(x), torch.tensor(scales), torch.zeros(len(scales), dtype=torch.int32), 1,
      -largest - 1, largest).numpy()


def read(box):
  return np.asarray(box.unbox())


def test_8_bits_are_those_of_pytorch():
  x = kernel(64, 6)
  box = quantize({'kernel': x}, ROUNDINGS['int8'])['kernel']
  assert box.values.dtype == jnp.int8 and box.values.shape == (64, 6)
  np.testing.assert_allclose(read(box), by_torch(x, np.abs(x).max(0) / 127, 127), atol=1e-6)


def test_4_bits_have_a_scale_for_32_inputs():
  x = kernel(64, 6)
  box = quantize({'kernel': x}, ROUNDINGS['int4'])['kernel']
  assert box.values.nbytes == x.nbytes / 8 and box.scales.shape == (2, 6)
  wanted = [by_torch(part, np.abs(part).max(0) / 7, 7) for part in (x[:32], x[32:])]
  np.testing.assert_allclose(read(box), np.concatenate(wanted), atol=1e-6)


def test_each_token_of_a_table_has_a_scale():
  x = kernel(5, 16) * np.float32([[1], [1e-3], [1e3], [1], [1]])
  for bits in (8, 4):
    box = quantize({'embedding': x}, Rounding(bits))['embedding']
    largest = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(
        read(box), by_torch(x.T.copy(), np.abs(x).max(1) / largest, largest).T, rtol=1e-5)


@pytest.mark.parametrize('shape', [(3, 7, 4), (2, 3, 3, 9, 4), (1, 1)])
@pytest.mark.parametrize('name', ROUNDINGS)
def test_any_shape_is_near(shape, name):
  x = kernel(*shape)
  found = read(quantize({'kernel': x}, ROUNDINGS[name])['kernel'])
  step = np.abs(x).max(-2, keepdims=True) / (127 if 'int8' in name or x.shape[-2] % 2 else 7)
  assert found.shape == x.shape and np.all(np.abs(found - x) <= step / 2 + 1e-6)


def test_zeros_stay_zeros():
  assert not read(quantize({'kernel': np.zeros((4, 4), np.float32)}, ROUNDINGS['int4'])[
      'kernel']).any()


@pytest.mark.parametrize('rows', [1, 2, 5])
def test_products_are_of_integers(rows):
  x, w = kernel(rows, 3, 32)[:, 0], kernel(32, 8)
  found = product(jnp.asarray(x), quantize({'kernel': w}, ROUNDINGS['int8'])['kernel'])
  scale = np.abs(x).max(1) / 127
  x_rounded = by_torch(x.T.copy(), scale, 127).T
  w_rounded = by_torch(w, np.abs(w).max(0) / 127, 127)
  np.testing.assert_allclose(found, x_rounded @ w_rounded, rtol=1e-4, atol=1e-4)


def test_gradients_pass_as_if_nothing_were_rounded():
  x = kernel(8, 4)

  def loss(x):
    return (read_jnp(rounded({'kernel': x}, ROUNDINGS['int4'])['kernel']) ** 2).sum()

  def read_jnp(box):
    return box.unbox()

  as_rounded = read(quantize({'kernel': x}, ROUNDINGS['int4'])['kernel'])
  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(x)), 2 * as_rounded, rtol=1e-5)


def pictures(count):
  rng = np.random.default_rng(0)
  return [Example(rng.integers(0, 256, (32, 32, 3), np.uint8), question='what color is it?')
          for _ in range(count)]


@pytest.mark.parametrize('name', ROUNDINGS)
def test_a_model_answers_as_when_its_steps_round(finished, name):
  """The integers of Predictor and the rounding of a training step are one arithmetic."""
  predictor = Predictor(str(finished), precision=name)
  whole = Predictor(str(finished))
  assert nbytes(predictor) < 0.4 * nbytes(whole)
  batch = predictor.batch(pictures(3), {'vqa': predictor.tasks['vqa']})
  model = whole.model.clone(heads={'vqa': whole.model.heads['vqa']})

  def answers(variables):
    return model.apply(variables, batch, method='predict')['vqa']['top_probability']

  variables = {**whole.variables, 'params': rounded(whole.variables['params'], ROUNDINGS[name])}
  found, wanted = answers(predictor.variables), answers(variables)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert np.abs(found - answers(whole.variables)).max() > 1e-7


def nbytes(predictor):
  return sum(x.nbytes for x in jax.tree.leaves(predictor.variables))


def test_a_precision_that_is_unknown(finished):
  with pytest.raises(UserError, match="precision 'int3': wanted one of float32, bfloat16, int8"):
    Predictor(str(finished), precision='int3')


def test_training_with_rounding_is_kept(tmp_path):
  workdir = tmp_path / 'run'
  tiny.train(workdir, tiny.changed(model__quantize='int8', train__steps=2))
  values = jax.tree.leaves(Predictor(str(workdir)).variables)
  assert any(x.dtype == jnp.int8 for x in values)  # as it was trained to be used
