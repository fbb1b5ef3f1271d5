"""DETR's backbone and encoder (arXiv:2005.12872) as a vision tower."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_sizes, scan_layers
from xmodal.models.padding import Padding
from xmodal.models.towers.resnet import ResNet


class Layer(nn.Module):
  """Sublayers of DETR's layers, residual and post-norm; attributes as in DetrEncoder."""

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  activation: str
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  def attend(self, name, x, positions, context, context_positions, mask, deterministic):
    """Attends from x [B, Q, D] to context [B, K, D].

    Positions, [1 or B, Q or K, D], are added to queries and keys but not to values.
    """
    layer = MultiHeadAttention(
        self.num_heads, self.hidden_dim // self.num_heads, self.hidden_dim, dtype=self.dtype,
        implementation=self.attention, kernel_init=nn.initializers.xavier_uniform(), name=name)
    y = layer(x + positions, context + context_positions, values=context, mask=mask)
    return self.add(name, x, y, deterministic)

  def feed_forward(self, x, deterministic):
    mlp = Mlp(self.mlp_dim, self.hidden_dim, self.activation, dtype=self.dtype,
              kernel_init=nn.initializers.xavier_uniform(), name='mlp')
    return self.add('mlp', x, mlp(x, deterministic=deterministic), deterministic)

  def add(self, name, x, y, deterministic):
    y = nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)
    return norm(self.dtype, f'{name}_norm')(x + y)


def norm(dtype, name):
  return nn.LayerNorm(1e-5, use_fast_variance=False, dtype=dtype, name=name)


class DetrEncoderLayer(Layer):
  """Self-attention and MLP, [B, N, D] -> [B, N, D]."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B N D'], positions: Float[Array, '#B N D'], *,
               mask: Bool[Array, 'B 1 1 N'] | None, deterministic: bool) -> Float[Array, 'B N D']:
    x = self.attend('attention', x, positions, x, positions, mask, deterministic)
    return self.feed_forward(x, deterministic)


class DetrEncoder(nn.Module):
  """Encodes normalised images [B, H, W, 3] as a feature map [B, H', W', D].

  Attributes:
    backbone: a ResNet; it computes in the dtype of this module.
    hidden_dim: D.
    num_layers, num_heads, mlp_dim: sizes of the encoder.
    activation: activation of the layers' MLPs, see `layers.Mlp`.
    dropout_rate: dropout in training, on each sublayer's output.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters are float32.
    remat: see `layers.scan_layers`.
    scan_unroll: see `layers.scan_layers`.
  """

  backbone: ResNet
  hidden_dim: int = 256
  num_layers: int = 6
  num_heads: int = 8
  mlp_dim: int = 2048
  activation: str = 'relu'
  dropout_rate: float = 0.
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], extent: Int[Array, 'B 2'] | None = None, *,
               deterministic: bool = True) -> Float[Array, 'B H2 W2 D']:
    """Encodes images; extent: (height, width) without the padding, see padding.Padding."""
    self.check()
    features = self.backbone.clone(parent=self, name='resnet', dtype=self.dtype, remat=self.remat)(
        images, extent, deterministic=deterministic)
    mask = Padding(extent, images.shape[1:3]).mask(features.shape[1:3])
    x, _, _ = encode(self, features, mask, deterministic)
    return x.reshape(*features.shape[:3], self.hidden_dim)

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    self.backbone.check()
    check_sizes('DetrEncoder', self, 'hidden_dim', 'num_layers', 'num_heads', 'mlp_dim')
    for divisor in (self.num_heads, 4):
      if self.hidden_dim % divisor:
        raise UserError(f'DetrEncoder: hidden_dim {self.hidden_dim} does not divide by {divisor}; '
                        'the heads must divide it, and 4 for the sines of the positions')


def encode(module, features: Float[Array, 'B H W C'], mask: Bool[Array, 'B H W'] | None,
           deterministic: bool) -> tuple[Float[Array, 'B N D'], Float[Array, '#B N D'],
                                         Bool[Array, 'B 1 1 N'] | None]:
  """Runs the encoder's layers as submodules of a compact module.

  Args:
    module: a DetrEncoder or Detr, whose sizes they have.
    features: the backbone's.
    mask: False for padding; None: no padding.
    deterministic: no dropout.

  Returns:
    The encoded cells, their positions, and the attention mask of the cells.
  """
  batch, height, width, _ = features.shape
  x = nn.Dense(module.hidden_dim, dtype=module.dtype, name='input_projection')(features)
  x = x.reshape(batch, height * width, module.hidden_dim)
  is_picture = jnp.ones((1, height, width), bool) if mask is None else mask
  positions = sine_positions(is_picture, module.hidden_dim)
  positions = positions.reshape(is_picture.shape[0], -1, module.hidden_dim).astype(module.dtype)
  key_mask = None if mask is None else is_picture.reshape(batch, 1, 1, -1)
  layer = DetrEncoderLayer(module.hidden_dim, module.mlp_dim, module.num_heads, module.activation,
                       module.dropout_rate, module.attention, module.dtype, name='encoder_layers')
  x, _ = scan_layers(
      lambda layer, x, _: (layer(x, positions, mask=key_mask, deterministic=deterministic), None),
      layer, x, num_layers=module.num_layers, remat=module.remat, unroll=module.scan_unroll)
  return x, positions, key_mask


def sine_positions(mask: Bool[Array, 'B H W'], hidden_dim: int
                   ) -> Float[Array, 'B H W {hidden_dim}']:
  """Sinusoidal position embeddings of a picture's cells (arXiv:2005.12872, appendix A.4).

  First half: row; second half: column. Unmasked rows and columns are counted, scaled so that
  the last is 2 pi, and encoded as alternating sines and cosines of falling frequency.

  Args:
    mask: bool [B, H, W], False for padding.
    hidden_dim: D, a multiple of 4.

  Returns:
    float32 [B, H, W, D].
  """
  half = hidden_dim // 2
  wavelengths = 10_000 ** (np.arange(0, half, 2) / half)
  positions = []
  for axis in (1, 2):
    count = jnp.cumsum(mask, axis, dtype=jnp.float32)
    last = jax.lax.slice_in_dim(count, mask.shape[axis] - 1, None, axis=axis)
    angles = (count / (last + 1e-6) * 2 * np.pi)[..., None] / wavelengths.astype(np.float32)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    positions.append(waves.reshape(*mask.shape, half))
  return jnp.concatenate(positions, axis=-1)
