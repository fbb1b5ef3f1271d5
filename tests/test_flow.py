"""Flow matching on a distribution with a known solution, and the parts of the denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from xmodal.errors import UserError
from xmodal.models.denoiser import denoiser, flow
from xmodal.models.denoiser.denoiser import PATCHES, Denoiser, rotary

MEAN = np.array([0.5, -0.3], np.float32)
COV = np.array([[0.30, 0.12], [0.12, 0.10]], np.float32)


def exact(z, t):
  """E[x | z] for x of N(MEAN, COV) and z = t x + (1 - t) noise: linear regression."""
  gain = t * COV @ jnp.linalg.inv(t * t * COV + (1 - t) ** 2 * jnp.eye(2))
  return MEAN + (z - t * MEAN) @ gain.T


def transported(noise, steps, sampler, predict='x'):
  def velocity(z, t):
    predicted = {'x': lambda: exact(z, t), 'v': lambda: (exact(z, t) - z) / (1 - t),
                 'noise': lambda: (z - t * exact(z, t)) / (1 - t)}[predict]()
    return flow.velocity(predicted, z, t, predict, least=1e-3)

  start = 0.02 if predict == 'noise' else 0.0  # at 0 the noise determines nothing of the picture
  return flow.integrate(velocity, noise, steps=steps, sampler=sampler, start=start)


def ideal(noise):
  """The end point of the flow: the linear map of optimal transport to N(MEAN, COV)."""
  values, vectors = np.linalg.eigh(COV)
  return MEAN + noise @ (vectors * np.sqrt(values)) @ vectors.T


@pytest.fixture(scope='module')
def noise():
  return np.random.default_rng(0).normal(size=(512, 2)).astype(np.float32)


@pytest.mark.parametrize('sampler, order', [('euler', 1), ('heun', 2)])
def test_noise_becomes_the_known_gaussian_with_the_order_of_the_sampler(noise, sampler, order):
  errors = [float(np.abs(transported(noise, steps, sampler) - ideal(noise)).mean())
            for steps in (16, 32, 64)]
  for coarse, fine in zip(errors, errors[1:]):
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.3)
  samples = np.asarray(transported(noise, 64, sampler))
  wanted = ideal(noise)
  np.testing.assert_allclose(samples.mean(0), wanted.mean(0), atol=0.02)
  np.testing.assert_allclose(np.cov(samples.T), np.cov(wanted.T), atol=0.02)


@pytest.mark.parametrize('predict', flow.PREDICTS)
def test_whatever_is_predicted_gives_the_same_velocities(noise, predict):
  x = transported(noise, 64, 'heun')
  other = transported(noise, 64, 'heun', predict)
  # When predicting noise, the start is a little later.
  np.testing.assert_allclose(other, x, atol=0.05 if predict == 'noise' else 1e-4)


@pytest.mark.parametrize('predict', flow.PREDICTS)
def test_the_loss_of_the_truth_is_zero_at_every_time(noise, predict):
  x, eps = noise[:256], noise[256:]
  truth = {'x': x, 'v': x - eps, 'noise': eps}[predict]
  t = jnp.linspace(0, 1, 256)
  np.testing.assert_allclose(flow.v_loss(truth, x, eps, t, predict), 0, atol=1e-6)
  inside = slice(20, 230)  # without clamping, the loss is the squared velocity error
  v = x - eps
  wrong = {'x': lambda: x + 0.1, 'v': lambda: v + 0.1, 'noise': lambda: eps + 0.1}[predict]()
  factor = {'x': 1 / (1 - t), 'v': jnp.ones_like(t), 'noise': 1 / t}[predict]
  np.testing.assert_allclose(flow.v_loss(wrong, x, eps, t, predict)[inside],
                             np.tile(np.square(0.1 * factor)[inside, None], (1, 2)), rtol=2e-3)


def test_times_are_logit_normal():
  t = np.asarray(flow.draw_times(jax.random.key(0), (20_000,), -0.8, 0.8))
  logits = np.log(t / (1 - t))
  assert logits.mean() == pytest.approx(-0.8, abs=0.02)
  assert logits.std() == pytest.approx(0.8, abs=0.02)


def test_a_late_start_goes_on_from_there(noise):
  """Starting at 0.5 from a point on the line leads to the same end."""
  def velocity(z, t):
    return flow.velocity(exact(z, t), z, t, 'x', least=1e-3)

  half = flow.integrate(lambda z, t: velocity(z, t / 2) / 2, noise, steps=64)
  np.testing.assert_allclose(flow.integrate(velocity, half, steps=64, start=0.5), ideal(noise),
                             atol=5e-3)


def test_every_step_is_told_once(noise):
  for sampler in flow.SAMPLERS:
    told = []
    flow.integrate(lambda z, t: z, noise, steps=5, sampler=sampler,
                   on_step=lambda step, z: told.append(int(step)))
    jax.effects_barrier()
    assert sorted(told) == [1, 2, 3, 4, 5]


def test_a_sampler_or_prediction_that_does_not_exist_is_a_mistake(noise):
  with pytest.raises(UserError, match="sampler='rk4': wanted euler, heun"):
    flow.integrate(lambda z, t: z, noise, steps=2, sampler='rk4')
  with pytest.raises(UserError, match='steps=0: wanted 1 or more'):
    flow.integrate(lambda z, t: z, noise, steps=0)
  with pytest.raises(UserError, match="predict='y'"):
    flow.velocity(noise, noise, jnp.ones(512), 'y')


# The denoiser


TINY = dict(image_size=(8, 12), patch_size=4, hidden_dim=16, mlp_dim=16, num_heads=2, num_layers=2,
            bottleneck_dim=8)


def test_products_of_turned_tokens_hang_on_their_distance_alone():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 8)).astype(np.float32)
  rows, columns = 4, 5
  rotate = rotary((rows, columns), 1, 8)
  tokens = lambda x: jnp.broadcast_to(jnp.asarray(x), (1, 1 + rows * columns, 1, 8))
  turned = [np.asarray(rotate(tokens(x)))[0, :, 0] for x in (query, key)]
  np.testing.assert_allclose(turned[0][0], query, rtol=1e-6)  # it has no position
  products = (turned[0][1:] @ turned[1][1:].T).reshape(rows, columns, rows, columns)
  for down, right in ((0, 1), (1, 0), (2, -3)):
    of_pairs = [products[r, c, r + down, c + right] for r in range(rows - down)
                for c in range(max(-right, 0), columns - max(right, 0))]
    np.testing.assert_allclose(of_pairs, of_pairs[0], rtol=1e-4, atol=1e-5)
  assert not np.isclose(products[0, 0, 0, 1], products[0, 0, 1, 0])


def test_windows_lie_around_their_patches_and_add_up_again():
  images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
  assert denoiser.to_windows(images, 4).shape == (2, 2, 3, 8 * 8 * 3)
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
  windows = np.asarray(denoiser.to_windows(images, 4))
  for row, column in np.ndindex(2, 3):
    seen = padded[:, 4 * row:4 * row + 8, 4 * column:4 * column + 8]
    np.testing.assert_array_equal(np.sort(windows[:, row, column]),
                                  np.sort(seen.reshape(2, -1)))
  # Each pixel lies in four windows, except at the edge.
  times = np.asarray(denoiser.from_windows(windows, 4)) / images
  expected = np.multiply.outer([1] * 2 + [2] * 4 + [1] * 2, [1] * 2 + [2] * 8 + [1] * 2)
  np.testing.assert_allclose(times, np.broadcast_to(expected[None, :, :, None], times.shape),
                             rtol=1e-5)
  transposed, = jax.linear_transpose(lambda x: denoiser.to_windows(x, 4), images)(windows)
  np.testing.assert_allclose(denoiser.from_windows(windows, 4), transposed, rtol=1e-6)


@pytest.mark.parametrize('patches', PATCHES)
def test_the_stem_begins_with_the_slow_cosines_of_each_square(patches):
  """As scipy's discrete cosine transform; lower frequencies have larger or equal amplitude."""
  z = np.random.default_rng(0).normal(size=(1, 8, 12, 3)).astype(np.float32)
  kernel = Denoiser(**{**TINY, 'bottleneck_dim': 18}, patches=patches).init(
      jax.random.key(0), z, jnp.zeros(1), jnp.zeros((1, 3, 8)), jnp.ones((1, 3), bool))[
          'params']['stem_down']['kernel']
  cut, square = {'plain': (denoiser.to_blocks, z[0, 4:8, 4:8]),
                 'overlap': (denoiser.to_windows, z[0, 2:10, 2:10])}[patches]
  if patches == 'overlap':
    square = np.pad(square, ((0, 2), (0, 0), (0, 0)))
  transformed = scipy.fft.dctn(square, axes=(0, 1), norm='ortho')
  slowest = np.stack([transformed[i] for i in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))])
  loud = np.asarray(cut(z, 4)[0, 1, 1] @ kernel) / slowest.reshape(-1)
  np.testing.assert_allclose(loud.reshape(-1, 3), loud[::3, None].repeat(3, 1), rtol=1e-3)
  assert (np.diff(loud[::3]) < 1e-4).all() and loud[-1] < loud[0] / 4
  assert (np.asarray(kernel) ** 2).sum() == pytest.approx(18)  # variance from white noise


@pytest.mark.parametrize('patches', PATCHES)
def test_the_denoiser_looks_at_picture_time_and_text_but_not_at_padding(patches):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
  text = rng.normal(size=(2, 3, 8)).astype(np.float32)
  mask = np.array([[True, True, False]] * 2)
  t = np.array([0.2, 0.2], np.float32)
  model = Denoiser(**TINY, patches=patches)
  init = jax.jit(model.init)(jax.random.key(0), z, t, text, mask)
  apply = jax.jit(model.apply)
  np.testing.assert_array_equal(apply(init, z, t, text, mask), np.zeros_like(z))
  leaves, tree = jax.tree.flatten(init)
  variables = tree.unflatten([x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
                              for x in leaves])
  base = apply(variables, z, t, text, mask)
  assert base.shape == z.shape and base.dtype == jnp.float32

  def change(z=z, t=t, text=text):
    return float(np.abs(apply(variables, z, t, text, mask) - base).max())

  far = z.copy()
  far[0, 0, 0] += 1
  assert change(z=far) > 1e-3
  moved = np.abs(apply(variables, far, t, text, mask) - base)
  assert moved[0, -1, -1].max() > 1e-5 and moved[1].max() == 0
  assert change(t=t + 0.3) > 1e-3
  read, unread = text.copy(), text.copy()
  read[:, 1] += 1
  unread[:, 2] += 100
  assert change(text=read) > 1e-3 and change(text=unread) == 0


@pytest.mark.parametrize('change, words', [
    (dict(image_size=(30, 30)), 'image_size=30 does not divide into patches of.*=4'),
    (dict(num_heads=8), 'num_heads=8 heads with a multiple of 4'),
    (dict(patch_size=1, patches='overlap'), "wants an even .*patch_size, found 1"),
    (dict(patches='vit'), "patches='vit'")])
def test_sizes_that_do_not_fit_are_one_line(change, words):
  with pytest.raises(UserError, match=words):
    Denoiser(**{**TINY, **change})


@pytest.mark.parametrize('patches', PATCHES)
def test_a_known_picture_costs_nothing_in_bfloat16(patches):
  """The velocity is a difference of two pictures divided by as little as 0.05."""
  model = Denoiser(**TINY, patches=patches)
  rng = np.random.default_rng(0)
  z, t = rng.normal(size=(2, *TINY['image_size'], 3)).astype(np.float32), jnp.array([0.96, 0.99])
  text, mask = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16), np.ones((2, 3), bool)
  variables = jax.tree.map(jnp.copy, model.init(jax.random.key(0), z, t, text, mask))
  bias = variables['params']['pixel_projection']['bias']
  variables['params']['pixel_projection']['bias'] = rng.uniform(-1, 1, bias.shape)
  in_bfloat16, x = (jax.jit(model.apply)(variables, z, t, text.astype(dtype), mask)
                    for dtype in (jnp.bfloat16, jnp.float32))
  assert in_bfloat16.dtype == jnp.float32 and np.abs(x).max() > 0.9
  assert flow.v_loss(in_bfloat16, x, z, t, 'x').max() < 1e-8
