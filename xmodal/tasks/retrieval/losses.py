"""Contrastive losses over all pairs of a batch: SigLIP's sigmoid and CLIP's softmax.

Plain functions of the whole batch's logits: where a batch is spread over
devices, jax.jit gathers what each needs, and a loss is that of one device.
"""

import jax
import jax.numpy as jnp

# CLIP keeps the scale of the logits below this, so that training stays stable.
_MAX_SCALE = 100.0


def normalise(x: jax.Array) -> jax.Array:
  """Vectors [..., D] of length 1, float32; zeros stay zeros."""
  x = x.astype(jnp.float32)
  # The square root of 0 has no gradient.
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def pair_logits(image: jax.Array, text: jax.Array, log_scale: jax.Array,
                bias: jax.Array | float = 0.0) -> jax.Array:
  """Cosine similarity of each picture (row) with each text (column), scaled and shifted.

  Args:
    image, text: float32 [B, D], of length 1.
    log_scale: scalar; the scale is at most 100.
    bias: scalar.

  Returns:
    float32 [B, B].
  """
  scale = jnp.exp(jnp.minimum(log_scale, jnp.log(_MAX_SCALE)))
  # A scale of 100 makes much of what products of fewer bits lose.
  return scale * jnp.einsum('id,td->it', image, text, precision='highest') + bias


def matching_pairs(tokens: jax.Array, pictures: jax.Array, valid: jax.Array) -> jax.Array:
  """Which pictures and texts of a batch belong together.

  Beside each picture and its own text these are pairs whose texts are equal and
  pairs of one picture: two scenes of one description, or two descriptions of
  one scene, would otherwise be pushed apart.

  Args:
    tokens: int32 [B, L], the texts.
    pictures: int32 [B], equal for the same picture.
    valid: bool [B], False for examples that stand for nothing.

  Returns:
    bool [B, B], symmetric; False wherever either is not valid.
  """
  same = (tokens[:, None] == tokens).all(-1) | (pictures[:, None] == pictures)
  return same & valid[:, None] & valid


def sigmoid_loss(logits: jax.Array, positive: jax.Array, valid: jax.Array) -> jax.Array:
  """SigLIP's loss (arXiv:2303.15343, algorithm 1): each pair is a yes or no of its own.

  Args:
    logits: float32 [B, B], of each picture (row) with each text (column).
    positive: bool [B, B], from matching_pairs.
    valid: bool [B]; the texts of others are no negatives.

  Returns:
    float32 [B], of each picture, summed over the texts. Its mean over valid
    pictures is the paper's loss.
  """
  of_pair = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
  return (of_pair * valid).sum(1)


def softmax_loss(logits: jax.Array, positive: jax.Array, valid: jax.Array) -> jax.Array:
  """CLIP's loss (arXiv:2103.00020, figure 3): which text is a picture's, which picture a text's.

  Where several match, the target is shared equally among them.

  Args and Returns: as sigmoid_loss; each example's is the mean of the two directions.
  """
  def one_way(logits):
    logits = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
    target = positive / jnp.maximum(positive.sum(1, keepdims=True), 1)
    return -(target * jax.nn.log_softmax(logits)).sum(1)

  return (one_way(logits) + one_way(logits.T)) / 2


LOSSES = {'sigmoid': sigmoid_loss, 'softmax': softmax_loss}
