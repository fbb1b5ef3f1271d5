"""Referring expressions: learned on symbolic scenes, and independent of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xmodal.models.detector.expressions import ExpressionScorer

KINDS, THINGS, WIDTH = 6, 5, 32
LEFT, RIGHT = KINDS, KINDS + 1  # words, beside one for each kind of thing
MODEL = ExpressionScorer()


def scenes(rng, count):
  """'KIND left of KIND': queries, words, boxes, and the referred object.

  An object of the same kind lies on the other side of the landmark.
  """
  kinds = np.stack([rng.permutation(KINDS)[:THINGS] for _ in range(count)])
  kinds[:, 1] = kinds[:, 0]
  x = rng.uniform(0.1, 0.9, (count, THINGS))
  left = rng.random(count) < 0.5
  # Objects 0 and 1 are of one kind, 2 is the landmark between them.
  low, middle, high = np.sort(x[:, :3], axis=1).T
  x[:, 0], x[:, 1], x[:, 2] = np.where(left, low, high), np.where(left, high, low), middle
  center = np.stack([x, rng.uniform(0.1, 0.9, x.shape)], -1)
  words = np.stack([kinds[:, 0], np.where(left, LEFT, RIGHT), kinds[:, 2]], 1)
  order = np.argsort(rng.random((count, THINGS)), axis=1)
  kinds = np.take_along_axis(kinds, order, 1)
  center = np.take_along_axis(center, order[..., None], 1)
  boxes = np.concatenate([center - 0.05, center + 0.05], -1)
  return (TABLE[kinds], TABLE[words] + PLACES, np.ones(words.shape, bool), np.float32(boxes),
          None), order.argmin(1)


TABLE = np.random.default_rng(0).normal(size=(KINDS + 2, WIDTH)).astype(np.float32)
PLACES = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)


@pytest.fixture(scope='module')
def trained():
  rng = np.random.default_rng(0)
  optimizer = optax.adam(1e-2)
  params = MODEL.init(jax.random.key(0), *scenes(rng, 1)[0])
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, inputs, meant):
    loss, grads = jax.value_and_grad(lambda p: optax.softmax_cross_entropy_with_integer_labels(
        MODEL.apply(p, *inputs, None), meant).mean())(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  for _ in range(300):
    inputs, meant = scenes(rng, 64)
    params, state, _ = step(params, state, inputs[:-1], meant)
  return params


def test_it_learns_on_which_side_of_another_a_thing_is(trained):
  inputs, meant = scenes(np.random.default_rng(1), 500)
  # Its kind alone leaves two candidates.
  assert (MODEL.apply(trained, *inputs).argmax(-1) == meant).mean() > 0.9


def test_padding_says_nothing(trained):
  (queries, words, word_mask, boxes, _), _ = scenes(np.random.default_rng(2), 4)
  expected = MODEL.apply(trained, queries, words, word_mask, boxes, None)
  more = ((0, 0), (0, 2), (0, 0))
  found = MODEL.apply(
      trained, jnp.pad(queries, more, constant_values=3), jnp.pad(words, more, constant_values=3),
      jnp.pad(word_mask, more[:2]), jnp.pad(boxes, more, constant_values=0.5),
      jnp.pad(jnp.ones(queries.shape[:2], bool), more[:2]))
  np.testing.assert_allclose(found[:, :THINGS], expected, atol=1e-4)


def test_boxes_learn_nothing_from_it(trained):
  inputs, _ = scenes(np.random.default_rng(3), 2)
  gradient = jax.grad(lambda boxes: MODEL.apply(trained, *inputs[:3], boxes, None).sum())(inputs[3])
  assert (np.asarray(gradient) == 0).all()


def test_neighbours_lie_apart_in_bfloat16_too(trained):
  """Things a hundredth of the picture apart, near its right edge."""
  (queries, words, word_mask, boxes, _), _ = scenes(np.random.default_rng(3), 64)
  boxes = 0.9 + 0.02 * boxes
  exact, rounded = (
      MODEL.apply(trained, queries.astype(dtype), words.astype(dtype), word_mask, boxes, None)
      for dtype in (jnp.float32, jnp.bfloat16))
  error = np.abs(rounded - exact).mean() / np.std(exact)
  assert error < 0.02
