"""Contrastive losses over all pairs of a batch: SigLIP's sigmoid and CLIP's softmax.

Plain functions of the whole batch's logits. If a batch is split over devices,
jax.jit gathers it, and the loss equals that on one device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# CLIP's upper limit of the logits' scale, for stable training.
_MAX_SCALE = 100.0


def normalise(x: Float[Array, '*B D']) -> Float[Array, '*B D']:
  """Scales vectors [..., D] to length 1, float32; zeros stay zeros."""
  x = x.astype(jnp.float32)
  # The square root of 0 has no gradient.
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def pair_logits(image: Float[Array, 'B D'], text: Float[Array, 'B D'],
                log_scale: Float[Array, ''] | float, bias: Float[Array, ''] | float = 0.0
                ) -> Float[Array, 'B B']:
  """Cosine similarity of each picture (row) with each text (column), scaled and shifted.

  Args:
    image, text: float32 [B, D], of length 1.
    log_scale: scalar; the scale is at most 100.
    bias: scalar.

  Returns:
    float32 [B, B].
  """
  scale = jnp.exp(jnp.minimum(log_scale, jnp.log(_MAX_SCALE)))
  # A scale of 100 amplifies the rounding errors of a lower precision.
  return scale * jnp.einsum('id,td->it', image, text, precision='highest') + bias


def matching_pairs(tokens: Int[Array, 'B L'], pictures: Int[Array, ' B'], valid: Bool[Array, ' B']
                   ) -> Bool[Array, 'B B']:
  """Mask of the positive pairs of pictures and texts in a batch.

  Besides each picture with its own text, pairs with equal texts and pairs of the
  same picture are positive. As negatives, two scenes of one description or two
  descriptions of one scene would be pushed apart.

  Args:
    tokens: int32 [B, L], the texts.
    pictures: int32 [B], picture ids.
    valid: bool [B], False for padding examples.

  Returns:
    bool [B, B], symmetric; False wherever either is not valid.
  """
  same = (tokens[:, None] == tokens).all(-1) | (pictures[:, None] == pictures)
  return same & valid[:, None] & valid


def sigmoid_loss(logits: Float[Array, 'B B'], positive: Bool[Array, 'B B'], valid: Bool[Array, ' B']
                 ) -> Float[Array, ' B']:
  """SigLIP's loss (arXiv:2303.15343, algorithm 1): a binary classification of each pair.

  Args:
    logits: float32 [B, B], of each picture (row) with each text (column).
    positive: bool [B, B], from matching_pairs.
    valid: bool [B]; texts of invalid examples are no negatives.

  Returns:
    float32 [B], the loss of each picture, summed over the texts. Its mean over valid
    pictures is the paper's loss.
  """
  pair_losses = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
  return (pair_losses * valid).sum(1)


def softmax_loss(logits: Float[Array, 'B B'], positive: Bool[Array, 'B B'], valid: Bool[Array, ' B']
                 ) -> Float[Array, ' B']:
  """CLIP's loss (arXiv:2103.00020, figure 3): cross-entropy of the texts and of the pictures.

  If an example has several positives, the target distribution is uniform over them.

  Args and Returns: as sigmoid_loss; the loss is the mean of the two directions.
  """
  def one_way(logits):
    logits = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
    target = positive / jnp.maximum(positive.sum(1, keepdims=True), 1)
    return -(target * jax.nn.log_softmax(logits)).sum(1)

  return (one_way(logits) + one_way(logits.T)) / 2


LOSSES = {'sigmoid': sigmoid_loss, 'softmax': softmax_loss}
