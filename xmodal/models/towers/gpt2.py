"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), encoder."""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_length, check_sizes, head_width, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, WRITER


class Gpt2Layer(nn.Module):
  """Self-attention and MLP, each pre-norm and residual: [B, L, D] -> [B, L, D].

  Attributes as in Gpt2.
  """

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  num_layers: int
  activation: str
  scale_attention: bool
  layer_norm_eps: float
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D'], query_scale: Float[Array, ''] | None = None, *,
               mask: Bool[Array, 'B 1 L L'], deterministic: bool = True) -> Float[Array, 'B L D']:
    """Updates x; query_scale: float scalar, factor of this layer's queries, or None."""
    def norm(name):
      return nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name=name)

    # Section 2.3: the sum of all sublayers must not grow with their number.
    last_init = nn.initializers.variance_scaling(
        0.5 / self.num_layers, 'fan_in', 'truncated_normal')
    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    y = MultiHeadAttention(
        self.num_heads, self.head_dim, self.hidden_dim,
        scale=None if self.scale_attention else 1., dropout_rate=self.dropout_rate,
        dtype=self.dtype, implementation=self.attention, out_init=last_init, name='attention')(
            norm('attention_norm')(x), mask=mask, query_scale=query_scale,
            deterministic=deterministic)
    x = x + dropout(y)
    y = Mlp(self.mlp_dim, self.hidden_dim, self.activation, dtype=self.dtype, down_init=last_init,
            name='mlp')(norm('mlp_norm')(x))
    return x + dropout(y)


PRESETS = {
    'tiny': dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
    'small': dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=6),
    'base': dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
    'large': dict(hidden_dim=1280, mlp_dim=5120, num_heads=20, num_layers=36),
    'xl': dict(hidden_dim=1600, mlp_dim=6400, num_heads=25, num_layers=48),
}


@PARTS.register('gpt2', options=WIDTHS | WRITER, slot='text', presets=PRESETS)
class Gpt2(nn.Module):
  """Encodes tokens [B, L] to [B, L, D], after the final norm; attention is causal.

  Attributes:
    vocab_size: V.
    hidden_dim: D.
    mlp_dim: width inside the MLPs.
    num_heads: attention heads.
    head_dim: width of a head; None: D / num_heads.
    num_layers: number of layers.
    max_positions: rows of the position table, the maximum length of a text.
    activation: activation of the MLPs, a key of layers.ACTIVATIONS.
    scale_attention: whether the logits are divided by the square root of the head's width.
    scale_attention_by_layer: whether the logits of layer n are also divided by n.
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
  max_positions: int = 1024
  activation: str = 'gelu_tanh'
  scale_attention: bool = True
  scale_attention_by_layer: bool = False
  layer_norm_eps: float = 1e-5
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
    length = tokens.shape[1]
    self.check()
    check_length('GPT-2', length, self.max_positions)
    init = nn.initializers.normal(0.02)
    x = nn.Embed(self.vocab_size, self.hidden_dim, dtype=self.dtype, embedding_init=init,
                 name='token_embedding')(tokens)
    positions = self.param('position_embedding', init, (self.max_positions, self.hidden_dim))
    x = x + positions[:length].astype(x.dtype)
    x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
    layer = Gpt2Layer(self.hidden_dim, self.mlp_dim, self.num_heads, head_width('GPT-2', self),
                      self.num_layers, self.activation, self.scale_attention, self.layer_norm_eps,
                      self.dropout_rate, self.attention, self.dtype, name='layers')
    mask = mask[:, None, None, :] & np.tri(length, dtype=bool)
    scales = 1 / jnp.arange(1., self.num_layers + 1) if self.scale_attention_by_layer else None
    x, _ = scan_layers(
        lambda layer, x, scale: (layer(x, scale, mask=mask, deterministic=deterministic), None),
        layer, x, scales, num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    return nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype,
                        name='final_norm')(x)

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    check_sizes('GPT-2', self, 'vocab_size', 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers',
                'max_positions')
    head_width('GPT-2', self)

  def __call__(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L'], *,
               deterministic: bool = True) -> Float[Array, 'B L {self.hidden_dim}']:
    """The same as `encode`."""
    return self.encode(tokens, mask, deterministic=deterministic)
