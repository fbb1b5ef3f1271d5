"""Which thing of a picture an expression means."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from xmodal.models.cross_modal import matching_init
from xmodal.models.detector.boxes import to_center
from xmodal.models.layers import Mlp


class MeantQuery(nn.Module):
  """How well what each query shows fits an expression: as a thing, in its place, beside another.

  As in MAttNet (arXiv:1801.08186) each of the three has words of its own: of 'the square
  left of the red circle' those for the square, for the circle, and for how the two
  lie. The last are matched with a description of each pair of boxes, as far as the
  other of the two is the circle.

  Attributes:
    num_readings: of the words, whose fits are summed.
    pair_dim: of the descriptions of places and pairs.
  """

  num_readings: int = 4
  pair_dim: int = 32

  @nn.compact
  def __call__(self, queries, words, word_mask, boxes, mask):
    """Logits of the queries, float32 [B, N].

    Args:
      queries: [B, N, D].
      words: tokens of the expression, [B, L, D], and word_mask, bool [B, L], False for padding.
      boxes: [B, N, 4], corners in 0..1 of the input; no gradient goes to them.
      mask: bool [B, N], False for queries at padding; None: there are none.
    """
    width, dtype = queries.shape[-1], queries.dtype

    def project(x, name, features=width, **init):
      return nn.Dense(features, dtype=dtype, name=f'{name}_projection', **init)(x)

    known = nn.LayerNorm(dtype=dtype, name='norm')(queries)
    words = nn.LayerNorm(dtype=dtype, name='word_norm')(words)
    attention = nn.Dense(3 * self.num_readings, dtype=jnp.float32, name='word_gate')(words)
    attention = jax.nn.softmax(jnp.where(word_mask[..., None], attention, -1e9), axis=1)
    thing, other, how = jnp.split(  # [B, R, D] each
        jnp.einsum('blr,bld->brd', attention.astype(dtype), words), 3, axis=1)

    # Contents are compared from the start (see matching_init).
    shown = project(known, 'query', kernel_init=matching_init)
    scale = jnp.exp(self.param('log_scale', nn.initializers.zeros, ())) * width ** -0.5

    def match(part, name):
      part = project(part, name, kernel_init=matching_init)
      return scale * jnp.einsum('bnd,brd->brn', shown, part, preferred_element_type=jnp.float32)

    fits = match(thing, 'thing')
    is_other = match(other, 'other')
    is_other += nn.Dense(1, dtype=jnp.float32, name='thing_gate')(known)[:, None, :, 0]
    if mask is not None:
      is_other = jnp.where(mask[:, None], is_other, -1e9)
    is_other = jax.nn.softmax(is_other).astype(dtype)

    how = project(how, 'how', self.pair_dim)
    # In float32: neighbours lie closer together than bfloat16 can tell.
    place = to_center(jax.lax.stop_gradient(boxes))
    fits += jnp.einsum('bnp,brp->brn', self._describe(place.astype(dtype), 'place'), how,
                       preferred_element_type=jnp.float32)
    apart = place[:, :, None, :2] - place[:, None, :, :2]  # [B, N, N, 2]
    far = jnp.sqrt(jnp.square(apart).sum(-1, keepdims=True) + 1e-4)
    pairs = jnp.concatenate([apart, far, apart / far], axis=-1)
    pairs = self._describe(pairs.astype(dtype), 'pair')
    fits += jnp.einsum('brm,bnmp,brp->brn', is_other, pairs, how,
                       preferred_element_type=jnp.float32)
    return fits.sum(1)

  def _describe(self, numbers, name):
    return Mlp(self.pair_dim, self.pair_dim, dtype=numbers.dtype, name=name)(numbers)
