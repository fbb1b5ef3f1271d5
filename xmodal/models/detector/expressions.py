"""Referring expressions: matches an expression with the queries of a picture."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xmodal.models.cross_modal import matching_init
from xmodal.models.detector.boxes import to_center
from xmodal.models.layers import Mlp


class ExpressionScorer(nn.Module):
  """Scores how well each query fits an expression: by its content, its place and another object.

  As in MAttNet (arXiv:1801.08186), each of three aspects attends to its own words. In 'the
  square left of the red circle' these are the words of the square (the target), of the circle
  (the other object), and of their relation. The relation is matched with a description of each
  pair of boxes, weighted by the probability that the pair's second box is the other object.

  Attributes:
    num_readings: R, attention readings of the words per aspect; their scores are summed.
    pair_dim: width of the descriptions of places and pairs.
  """

  num_readings: int = 4
  pair_dim: int = 32

  @nn.compact
  def __call__(self, queries: Float[Array, 'B N D'], words: Float[Array, 'B L D'],
               word_mask: Bool[Array, 'B L'], boxes: Float[Array, 'B N 4'],
               mask: Bool[Array, 'B N'] | None) -> Float[Array, 'B N']:
    """Logits of the queries, float32 [B, N].

    Args:
      queries: [B, N, D].
      words: tokens of the expression, [B, L, D].
      word_mask: bool [B, L], False for padding.
      boxes: [B, N, 4], corners in 0..1 of the input; they receive no gradient.
      mask: bool [B, N], False for queries in padding; None: no padding.
    """
    width, dtype = queries.shape[-1], queries.dtype

    def project(x, name, features=width, **init):
      return nn.Dense(features, dtype=dtype, name=f'{name}_projection', **init)(x)

    normed = nn.LayerNorm(dtype=dtype, name='norm')(queries)
    words = nn.LayerNorm(dtype=dtype, name='word_norm')(words)
    attention = nn.Dense(3 * self.num_readings, dtype=jnp.float32, name='word_gate')(words)
    attention = jax.nn.softmax(jnp.where(word_mask[..., None], attention, -1e9), axis=1)
    thing, other, how = jnp.split(  # [B, R, D] each
        jnp.einsum('blr,bld->brd', attention.astype(dtype), words), 3, axis=1)

    # Logits start as a similarity of contents (see matching_init).
    projected = project(normed, 'query', kernel_init=matching_init)
    scale = jnp.exp(self.param('log_scale', nn.initializers.zeros, ())) * width ** -0.5

    def match(part, name):
      part = project(part, name, kernel_init=matching_init)
      return scale * jnp.einsum('bnd,brd->brn', projected, part, preferred_element_type=jnp.float32)

    logits = match(thing, 'thing')
    is_other = match(other, 'other')
    is_other += nn.Dense(1, dtype=jnp.float32, name='thing_gate')(normed)[:, None, :, 0]
    if mask is not None:
      is_other = jnp.where(mask[:, None], is_other, -1e9)
    is_other = jax.nn.softmax(is_other).astype(dtype)

    how = project(how, 'how', self.pair_dim)
    # In float32: bfloat16 cannot distinguish the positions of neighbours.
    place = to_center(jax.lax.stop_gradient(boxes))
    logits += jnp.einsum('bnp,brp->brn', self._describe(place.astype(dtype), 'place'), how,
                       preferred_element_type=jnp.float32)
    offset = place[:, :, None, :2] - place[:, None, :, :2]  # [B, N, N, 2]
    distance = jnp.sqrt(jnp.square(offset).sum(-1, keepdims=True) + 1e-4)
    pairs = jnp.concatenate([offset, distance, offset / distance], axis=-1)
    pairs = self._describe(pairs.astype(dtype), 'pair')
    logits += jnp.einsum('brm,bnmp,brp->brn', is_other, pairs, how,
                       preferred_element_type=jnp.float32)
    return logits.sum(1)

  def _describe(self, numbers, name):
    return Mlp(self.pair_dim, self.pair_dim, dtype=numbers.dtype, name=name)(numbers)
