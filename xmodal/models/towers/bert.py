"""BERT's encoder (arXiv:1810.04805)."""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_length, check_sizes, head_width, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, WRITER


class BertLayer(nn.Module):
  """Self-attention and MLP, residual and post-norm: [B, L, D] -> [B, L, D]; fields as in Bert."""

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  activation: str
  layer_norm_eps: float
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D'], *, mask: Bool[Array, 'B 1 1 L'],
               deterministic: bool = True) -> Float[Array, 'B L D']:
    def norm(name):
      return nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name=name)

    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    y = MultiHeadAttention(
        self.num_heads, self.head_dim, self.hidden_dim,
        dropout_rate=self.dropout_rate, dtype=self.dtype, implementation=self.attention,
        name='attention')(x, mask=mask, deterministic=deterministic)
    x = norm('attention_norm')(x + dropout(y))
    y = Mlp(self.mlp_dim, self.hidden_dim, self.activation, dtype=self.dtype, name='mlp')(x)
    return norm('mlp_norm')(x + dropout(y))


PRESETS = {
    'tiny': dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
    'small': dict(hidden_dim=512, mlp_dim=2048, num_heads=8, num_layers=4),
    'base': dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
    'large': dict(hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=24),
    'xl': dict(hidden_dim=2048, mlp_dim=8192, num_heads=32, num_layers=24),
}


@PARTS.register('bert', options=WIDTHS | WRITER, slot='text', presets=PRESETS,
                sharding=((r'type_embedding$', ()),))
class Bert(nn.Module):
  """Encodes tokens [B, L] to [B, L, D], after the last layer's norm; all tokens have type 0.

  Attributes:
    vocab_size: V.
    hidden_dim: D.
    mlp_dim: width inside the MLPs.
    num_heads: attention heads.
    head_dim: width of a head; None: D / num_heads.
    num_layers: number of layers.
    max_positions: rows of the position table, the maximum length of a text.
    num_token_types: rows of the type table; only the first is used.
    activation: activation of the MLPs, a key of layers.ACTIVATIONS.
    layer_norm_eps: epsilon of the layer norms.
    dropout_rate: dropout in training, on embeddings, attention weights and each sublayer.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters are float32.
    remat: see `layers.scan_layers`.
    scan_unroll: see `layers.scan_layers`.
  """

  vocab_size: int
  hidden_dim: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  max_positions: int = 512
  num_token_types: int = 2
  activation: str = 'gelu'
  layer_norm_eps: float = 1e-12
  dropout_rate: float = 0.
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1
  head_dim: int | None = None

  @nn.compact
  def encode(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L'], *,
             deterministic: bool = True) -> Float[Array, 'B L {self.hidden_dim}']:
    """Encodes tokens int32 [B, L] to [B, L, D]; mask: bool [B, L], False for padding.

    Raises:
      UserError: a text is longer than the position table, or num_heads does not divide D.
    """
    self.check()
    check_length('BERT', tokens.shape[1], self.max_positions)
    init = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocab_size, self.hidden_dim, dtype=self.dtype, embedding_init=init,
                 name='token_embedding')(tokens)
    positions = self.param('position_embedding', init, (self.max_positions, self.hidden_dim))
    types = self.param('type_embedding', init, (self.num_token_types, self.hidden_dim))
    x = x + positions[:tokens.shape[1]].astype(x.dtype) + types[0].astype(x.dtype)
    x = nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype,
                     name='embedding_norm')(x)
    x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
    layer = BertLayer(self.hidden_dim, self.mlp_dim, self.num_heads, head_width('BERT', self),
                      self.activation, self.layer_norm_eps, self.dropout_rate, self.attention,
                      self.dtype, name='layers')
    mask = mask[:, None, None, :]
    x, _ = scan_layers(
        lambda layer, x, _: (layer(x, mask=mask, deterministic=deterministic), None), layer, x,
        num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    return x

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    check_sizes('BERT', self, 'vocab_size', 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers',
                'max_positions', 'num_token_types')
    head_width('BERT', self)

  def __call__(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L'], *,
               deterministic: bool = True) -> Float[Array, 'B L {self.hidden_dim}']:
    """The same as `encode`."""
    return self.encode(tokens, mask, deterministic=deterministic)
