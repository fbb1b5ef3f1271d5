"""Pooling: one vector from the tokens of a picture or a text."""

import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp


class AttentionPool(nn.Module):
  """SigLIP's pooling (arXiv:2303.15343): a learned query attends to the tokens; then an MLP.

  The number of heads is the greatest common divisor of the width and 8.
  """

  @nn.compact
  def __call__(self, tokens: Float[Array, 'B N D'], mask: Bool[Array, 'B N'] | None = None
               ) -> Float[Array, 'B D']:
    """Pools tokens [B, N, D] to [B, D]; mask: bool [B, N], False for padding, or None."""
    width, dtype = tokens.shape[-1], tokens.dtype
    num_heads = math.gcd(width, 8)
    query = self.param('query_embedding', nn.initializers.normal(width ** -0.5), (1, 1, width))
    query = jnp.broadcast_to(query, (tokens.shape[0], 1, width)).astype(dtype)
    mask = None if mask is None else mask[:, None, None]
    x = MultiHeadAttention(num_heads, width // num_heads, width, dtype=dtype, name='attention')(
        query, tokens, mask=mask)
    norm = nn.LayerNorm(1e-6, use_fast_variance=False, dtype=dtype, name='norm')
    return (x + Mlp(4 * width, width, dtype=dtype, name='mlp')(norm(x)))[:, 0]
