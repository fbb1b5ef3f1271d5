"""Vision Transformer (arXiv:2010.11929), with the additions of DeiT and DINOv2."""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_sizes, head_width, scan_layers
from xmodal.models.padding import Padding
from xmodal.models.parts import PARTS, WIDTHS, size


class ViTLayer(nn.Module):
  """Pre-norm transformer layer, [B, N, D] -> [B, N, D]. Attributes as in ViT.

  Starts as the identity, which learns faster (arXiv:2003.04887).
  """

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  layer_norm_eps: float
  dropout_rate: float
  gelu: str
  swiglu: bool
  layer_scale: float | None
  qkv_bias: bool
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B N D'], mask: Bool[Array, 'B 1 1 N'] | None = None, *,
               deterministic: bool = True) -> Float[Array, 'B N D']:
    """Updates x [B, N, D]."""
    def norm(name):
      return nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name=name)

    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    y = MultiHeadAttention(
        self.num_heads, self.head_dim, self.hidden_dim,
        use_bias=self.qkv_bias, out_bias=True, dtype=self.dtype, implementation=self.attention,
        out_init=nn.initializers.zeros, name='attention')(norm('attention_norm')(x), mask=mask)
    x = x + dropout(self._scaled(y, 'attention_scale'))
    activation = 'silu' if self.swiglu else {'exact': 'gelu', 'tanh': 'gelu_tanh'}[self.gelu]
    y = Mlp(self.mlp_dim, self.hidden_dim, activation, gated=self.swiglu,
            dropout_rate=self.dropout_rate, dtype=self.dtype, down_init=nn.initializers.zeros,
            name='mlp')(norm('mlp_norm')(x), deterministic=deterministic)
    return x + dropout(self._scaled(y, 'mlp_scale'))

  def _scaled(self, y, name):
    if self.layer_scale is None:
      return y
    scale = self.param(name, nn.initializers.constant(self.layer_scale), (self.hidden_dim,))
    return y * scale.astype(y.dtype)


class PatchStem(nn.Module):
  """Projects each patch with one linear layer, [B, H, W, 3] -> [B, H/P, W/P, D]."""

  patch_size: int
  hidden_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], padding: Padding
               ) -> Float[Array, 'B rows columns {self.hidden_dim}']:
    del padding  # Patches do not mix.
    batch, height, width, channels = images.shape
    p = self.patch_size
    patches = images.reshape(batch, height // p, p, width // p, p, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // p, width // p, -1)
    return nn.Dense(self.hidden_dim, dtype=self.dtype, name='projection')(patches)


class ConvStem(nn.Module):
  """Stride-2 3x3 convolutions down to one position per patch (arXiv:2106.14881).

  [B, H, W, 3] -> [B, H/P, W/P, D] for P a power of two; the width doubles with
  each convolution up to D. Layer norms replace the paper's batch norms.
  """

  patch_size: int
  hidden_dim: int
  layer_norm_eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], padding: Padding
               ) -> Float[Array, 'B rows columns {self.hidden_dim}']:
    """Embeds images; pixels in their padding do not affect those outside."""
    num_convs = self.patch_size.bit_length() - 1
    if self.patch_size != 2 ** num_convs or num_convs < 1:
      raise UserError(f"ViT: stem 'conv' wants a patch_size that is a power of two, found "
                      f"{self.patch_size}; use 8 or 16, or stem 'patch'")
    x = images
    for i in range(num_convs):
      features = max(self.hidden_dim >> (num_convs - 1 - i), 8)
      x = nn.Conv(features, (3, 3), strides=2, use_bias=False, dtype=self.dtype,
                  name=f'conv{i + 1}')(x)
      x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name=f'conv{i + 1}_norm')(x)
      x = padding.clear(nn.relu(x))
    return nn.Dense(self.hidden_dim, dtype=self.dtype, name='projection')(x)


SHARDING = (
    # Few mesh sizes divide a patch's 14 x 14 x 3 values; split the width instead.
    (r'stem/projection/kernel$', (None, ('tensor', 'fsdp'))),
    (r'(cls_token|distillation_token|registers|attention_scale|mlp_scale)$', ()))
PRESETS = {
    'tiny': dict(patch_size=8, hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1, stem='conv',
                 gelu='tanh'),
    'small': dict(patch_size=16, hidden_dim=384, mlp_dim=1536, num_heads=6, num_layers=12),
    'base': dict(patch_size=16, hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
    'large': dict(patch_size=16, hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=24),
    'xl': dict(patch_size=14, hidden_dim=1408, mlp_dim=6144, num_heads=16, num_layers=40),
}


@PARTS.register('vit', options=WIDTHS | {'patch_size': size('Side of a patch in pixels.')},
                slot='vision', presets=PRESETS, sharding=SHARDING,
                first_parameters=('cls_token', 'distillation_token', 'registers'),
                fixed={'use_cls_token': False})
class ViT(nn.Module):
  """Maps normalised images [B, H, W, 3] to tokens [B, E + N, D], after the final layer norm.

  First E extra tokens (class token, distillation token, registers, in this order,
  each if enabled), then N = H/P * W/P patch tokens, row by row from the top left.

  Attributes:
    patch_size: P, pixels.
    hidden_dim: D.
    mlp_dim: width inside the MLPs.
    num_heads: attention heads.
    head_dim: width of a head; None: D / num_heads.
    num_layers: L.
    image_size: (H, W), pixels; sets the size of the position table.
    layer_norm_eps: epsilon of the layer norms.
    dropout_rate: dropout in training, on embeddings and on each sublayer.
    use_cls_token: whether token 0 is a learned class token.
    use_distillation_token: whether DeiT's distillation token follows (arXiv:2012.12877).
    num_registers: number of register tokens, which have no position and hold global
      information (arXiv:2309.16588).
    stem: 'patch' (linear) or 'conv' (learns faster from scratch).
    gelu: 'exact' or 'tanh'.
    swiglu: the MLPs are silu(gate(x)) * up(x) instead (arXiv:2002.05202).
    layer_scale: initial value of learned per-channel factors on each sublayer's
      output (arXiv:2103.17239); None: no factors.
    qkv_bias: whether query, key and value have biases.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters are float32.
    remat: see `layers.scan_layers`.
    scan_unroll: see `layers.scan_layers`.
  """

  patch_size: int
  hidden_dim: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  image_size: tuple[int, int]
  layer_norm_eps: float = 1e-6
  dropout_rate: float = 0.
  use_cls_token: bool = True
  use_distillation_token: bool = False
  num_registers: int = 0
  stem: str = 'patch'
  gelu: str = 'exact'
  swiglu: bool = False
  layer_scale: float | None = None
  qkv_bias: bool = True
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1
  head_dim: int | None = None

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W C'], extent: Int[Array, 'B 2'] | None = None, *,
               deterministic: bool = True) -> Float[Array, 'B N {self.hidden_dim}']:
    """Maps float images [B, H, W, 3] to tokens [B, E + N, D].

    With an extent (see padding.Padding) tokens in the padding are masked.

    Raises:
      UserError: the pictures' size is not image_size, patch_size does not divide it,
        num_heads does not divide D, or the stem or gelu is unknown.
    """
    self.check()
    if images.shape[1:] != (*self.image_size, 3):
      raise UserError(f'ViT: pictures are {images.shape[1:]} (height, width, channels), '
                      f'{(*self.image_size, 3)} is wanted; resize them or set image_size')
    padding = Padding(extent, images.shape[1:3])
    x = self._stem()(padding.clear(images.astype(self.dtype)), padding)
    grid = x.shape[1:3]
    x = x.reshape(x.shape[0], -1, self.hidden_dim)
    num_patches = x.shape[1]
    if self.use_distillation_token:
      x = jnp.concatenate([self._extra_tokens('distillation_token', 1, x), x], axis=1)
    if self.use_cls_token:
      x = jnp.concatenate([self._extra_tokens('cls_token', 1, x), x], axis=1)
    positions = self.param('position_embedding', self._position_init, x.shape[1:])
    x = x + positions.astype(x.dtype)
    if self.num_registers:
      first, patches = jnp.split(x, [x.shape[1] - num_patches], axis=1)
      registers = self._extra_tokens('registers', self.num_registers, x)
      x = jnp.concatenate([first, registers, patches], axis=1)
    x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
    mask = padding.token_mask(grid, x.shape[1] - num_patches)
    if mask is not None:
      mask = mask[:, None, None, :]
    layer = ViTLayer(self.hidden_dim, self.mlp_dim, self.num_heads, head_width('ViT', self),
                     self.layer_norm_eps, self.dropout_rate, self.gelu, self.swiglu,
                     self.layer_scale, self.qkv_bias, self.attention, self.dtype, name='layers')
    x, _ = scan_layers(
        lambda layer, x, _: (layer(x, mask, deterministic=deterministic), None), layer, x,
        num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    return nn.LayerNorm(self.layer_norm_eps, use_fast_variance=False, dtype=self.dtype,
                        name='final_norm')(x)

  def _extra_tokens(self, name, count, x):
    """Learned tokens [B, count, D], in the batch size and dtype of x [B, N, D]."""
    tokens = self.param(name, nn.initializers.normal(0.02), (1, count, self.hidden_dim))
    return jnp.broadcast_to(tokens, (x.shape[0], count, self.hidden_dim)).astype(x.dtype)

  def _position_init(self, rng, shape, dtype=jnp.float32):
    """Initialises positions with sines and cosines of row and column (arXiv:2205.01580)."""
    num_tokens, width = shape
    if width % 4:
      return nn.initializers.normal(0.02)(rng, shape, dtype)
    rows, columns = (side // self.patch_size for side in self.image_size)
    row, column = np.divmod(np.arange(rows * columns), columns)
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequencies for place in (row, column)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    # Class and distillation tokens have no position.
    return jnp.asarray(np.pad(table, ((num_tokens - len(table), 0), (0, 0))), dtype)

  def _stem(self):
    if self.stem == 'patch':
      return PatchStem(self.patch_size, self.hidden_dim, self.dtype, name='stem')
    return ConvStem(self.patch_size, self.hidden_dim, self.layer_norm_eps, self.dtype, name='stem')

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    check_sizes('ViT', self, 'patch_size', 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers',
                'image_size')
    if any(side % self.patch_size for side in self.image_size):
      raise UserError(f'ViT: image_size {self.image_size} does not divide into patches of '
                      f'{self.patch_size}; use multiples of it')
    head_width('ViT', self)
    if self.stem not in ('patch', 'conv'):
      raise UserError(f"ViT: stem {self.stem!r} is unknown; use 'patch' or 'conv'")
    if self.gelu not in ('exact', 'tanh'):
      raise UserError(f"ViT: gelu {self.gelu!r} is unknown; use 'exact' or 'tanh'")
