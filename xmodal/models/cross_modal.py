"""Cross-modal layers: attention between vision and text tokens.

Both variants map vision tokens [B, N, D] and text tokens [B, L, D] to the same shapes.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_sizes, head_width, scan_layers
from xmodal.models.parts import PARTS, WIDTHS
from xmodal.options import Option


def matching_init(rng, shape, dtype=jnp.float32):
  """Kernel initialiser that ignores its rng: queries and keys get equal random projections.

  Attention then starts as a similarity of contents: a word attends to similar image
  tokens (cf. mimetic initialisation, arXiv:2305.09828).
  """
  del rng
  return nn.initializers.lecun_normal()(jax.random.key(0), shape, dtype)


class Sublayers(nn.Module):
  """Sublayers shared by the layers below: pre-norm residual attention and MLP.

  Each starts as the identity, so that the towers' outputs pass unchanged.
  """

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  def norm(self, x: Float[Array, 'B N D'], name: str) -> Float[Array, 'B N D']:
    return nn.LayerNorm(dtype=self.dtype, name=name)(x)

  def attend(self, x: Float[Array, 'B Q D'], context: Float[Array, 'B K D'] | None,
             mask: Bool[Array, 'B 1 1 K'] | None, name: str, deterministic: bool
             ) -> Float[Array, 'B Q D']:
    """Attends from x to the context (None: x) and projects; no residual."""
    layer = MultiHeadAttention(self.num_heads, self.head_dim, self.hidden_dim,
                               dtype=self.dtype, implementation=self.attention,
                               query_init=matching_init, key_init=matching_init,
                               out_init=nn.initializers.zeros, name=name)
    return self.dropout(layer(x, context, mask=mask), deterministic)

  def mlp(self, x: Float[Array, 'B N D'], name: str, deterministic: bool
          ) -> Float[Array, 'B N D']:
    """Normalises x and runs an MLP; no residual."""
    layer = Mlp(self.mlp_dim, self.hidden_dim, dropout_rate=self.dropout_rate, dtype=self.dtype,
                down_init=nn.initializers.zeros, name=name)
    y = layer(self.norm(x, f'{name}_norm'), deterministic=deterministic)
    return self.dropout(y, deterministic)

  def dropout(self, x: Float[Array, 'B N D'], deterministic: bool) -> Float[Array, 'B N D']:
    return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)


class CoAttentionLayer(Sublayers):
  """Each stream attends to the other, then to itself, then passes an MLP.

  The order of LXMERT (arXiv:1908.07490, section 2.2), pre-norm, each stream
  with parameters of its own (as in ViLBERT, arXiv:1908.02265).
  """

  @nn.compact
  def __call__(self, vision: Float[Array, 'B N D'], text: Float[Array, 'B L D'],
               vision_mask: Bool[Array, 'B 1 1 N'] | None, text_mask: Bool[Array, 'B 1 1 L'], *,
               deterministic: bool) -> tuple[Float[Array, 'B N D'], Float[Array, 'B L D']]:
    """Updates vision [B, N, D] and text [B, L, D]."""
    normed_vision = self.norm(vision, 'vision_cross_norm')
    normed_text = self.norm(text, 'text_cross_norm')
    # Both streams attend to the other one's input to this layer.
    vision = vision + self.attend(normed_vision, normed_text, text_mask, 'vision_cross',
                                  deterministic)
    text = text + self.attend(normed_text, normed_vision, vision_mask, 'text_cross',
                              deterministic)

    normed_vision = self.norm(vision, 'vision_self_norm')
    normed_text = self.norm(text, 'text_self_norm')
    vision = vision + self.attend(normed_vision, None, vision_mask, 'vision_self', deterministic)
    text = text + self.attend(normed_text, None, text_mask, 'text_self', deterministic)

    vision = vision + self.mlp(vision, 'vision_mlp', deterministic)
    text = text + self.mlp(text, 'text_mlp', deterministic)
    return vision, text


class MergedLayer(Sublayers):
  """Self-attention over the concatenated tokens, then an MLP (arXiv:1908.03557)."""

  @nn.compact
  def __call__(self, tokens: Float[Array, 'B N D'], mask: Bool[Array, 'B 1 1 N'], *,
               deterministic: bool) -> Float[Array, 'B N D']:
    """Updates tokens, [B, N, D], those of both streams."""
    normed = self.norm(tokens, 'self_norm')
    tokens = tokens + self.attend(normed, None, mask, 'self', deterministic)
    return tokens + self.mlp(tokens, 'mlp', deterministic)


PRESETS = {
    'tiny': dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
    'small': dict(hidden_dim=384, mlp_dim=1536, num_heads=6, num_layers=4),
    'base': dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=6),
    'large': dict(hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=6),
    'xl': dict(hidden_dim=1408, mlp_dim=6144, num_heads=16, num_layers=8),
}


@PARTS.register('cross', options=WIDTHS | {
    # At least one dimension for rows and one for columns.
    'hidden_dim': dataclasses.replace(WIDTHS['hidden_dim'], low=2),
    'variant': Option('co_attention', 'co_attention: two streams; merged: one concatenated stream.',
                      choices=('co_attention', 'merged'))}, slot='cross', presets=PRESETS)
class CrossModal(nn.Module):
  """A stack of cross-modal layers.

  Attributes:
    variant: 'co_attention' (two streams) or 'merged' (one concatenated stream).
    hidden_dim, mlp_dim, num_heads, num_layers: sizes.
    head_dim: width of a head; None: hidden_dim / num_heads.
    dropout_rate: dropout on each sublayer, in training.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters are float32.
    remat, scan_unroll: see `layers.scan_layers`.
  """

  variant: str
  hidden_dim: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  dropout_rate: float = 0.0
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1
  head_dim: int | None = None

  @nn.compact
  def __call__(self, vision: Float[Array, 'B N D'], text: Float[Array, 'B L D'],
               text_mask: Bool[Array, 'B L'], vision_mask: Bool[Array, 'B N'] | None = None, *,
               deterministic: bool) -> tuple[Float[Array, 'B N D'], Float[Array, 'B L D']]:
    """Runs the layers.

    Args:
      vision: [B, N, D].
      text: [B, L, D].
      text_mask: bool [B, L], False for padding.
      vision_mask: bool [B, N], False for padding; None: no padding.
      deterministic: no dropout.

    Returns:
      vision [B, N, D] and text [B, L, D]. Neither has a final norm, so a token's norm can
      express its importance.
    """
    check_sizes('cross-modal layers', self, 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')
    kind = {'co_attention': CoAttentionLayer, 'merged': MergedLayer}[self.variant]
    layer = kind(self.hidden_dim, self.mlp_dim, self.num_heads,
                 head_width('cross-modal layers', self), self.dropout_rate, self.attention,
                 self.dtype, name='layers')
    stack = dict(num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    if self.variant == 'co_attention':
      masks = [None if mask is None else mask[:, None, None, :]
               for mask in (vision_mask, text_mask)]
      (vision, text), _ = scan_layers(
          lambda layer, streams, _: (layer(*streams, *masks, deterministic=deterministic), None),
          layer, (vision, text), **stack)
    else:
      tokens = jnp.concatenate([vision, text], axis=1)
      if vision_mask is None:
        vision_mask = jnp.ones(vision.shape[:2], bool)
      mask = jnp.concatenate([vision_mask, text_mask], axis=1)[:, None, None, :]
      tokens, _ = scan_layers(
          lambda layer, tokens, _: (layer(tokens, mask, deterministic=deterministic), None),
          layer, tokens, **stack)
      vision, text = jnp.split(tokens, [vision.shape[1]], axis=1)
    return vision, text
