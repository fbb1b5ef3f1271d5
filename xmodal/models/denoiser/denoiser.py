"""A plain transformer over patches that denoises pictures, conditioned on a text and the time.

After JiT (arXiv:2511.13720, section 4): patches through a bottleneck, RMS norms, SwiGLU, rotary
positions, normed queries and keys, adaLN-Zero for the time (arXiv:2212.09748), and a few
in-context tokens for the condition. Layers also attend to the text by cross-attention.
"""

from collections.abc import Callable
import functools
import itertools
import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.joint import GridPosition
from xmodal.models.layers import Mlp, head_width, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, size

PATCHES = ('overlap', 'plain')
_TIME_WAVES = 64
# Radians of the slowest and the fastest wave over all times. Low enough that what is learned at
# one time generalises to nearby times. (With 1000, 0.500 and 0.505 would be far apart.)
_TIME_RADIANS = (0.5, 30.0)
# Scale of the slowest rotary wave, in patches: far longer than any picture.
_SLOWEST = 100.0


def rotary(grid: tuple[int, int], extra: int, head_dim: int) -> Callable:
  """2-D rotary position embedding by row and column (arXiv:2104.09864).

  Args:
    grid: (rows, columns) of the grid's tokens, which are ordered row by row.
    extra: number of tokens before them, which have no position and are not rotated.
    head_dim: a multiple of 4; half of it is rotated by the row, half by the column.

  Returns:
    Function that rotates queries or keys [B, extra + rows * columns, H, head_dim], so that
    their products depend on relative positions.
  """
  row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  frequencies = _SLOWEST ** -(np.arange(head_dim // 4) / (head_dim // 4))
  angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=1)
  angles = np.pad(angles, ((extra, 0), (0, 0)))[:, None]
  cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))

  def rotate(x: Float[Array, 'B N H head_dim']) -> Float[Array, 'B N H head_dim']:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)

  return rotate


class DenoiserLayer(nn.Module):
  """Self-attention, cross-attention to the text, and an MLP: [B, N, D] -> [B, N, D].

  The condition sets the scale, shift and gate of self-attention and MLP (adaLN-Zero). The layer
  starts as the identity. Attributes as in Denoiser.
  """

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B N D'], condition: Float[Array, 'B D'],
               text: Float[Array, 'B L D'], text_mask: Bool[Array, 'B 1 1 L'], rotate: Callable, *,
               deterministic: bool) -> Float[Array, 'B N D']:
    """Updates x [B, N, D]; rotate: see `rotary`."""
    parts = nn.Dense(6 * self.hidden_dim, dtype=self.dtype, kernel_init=nn.initializers.zeros,
                     name='modulation')(nn.silu(condition))[:, None]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(parts, 6, axis=-1)
    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    y = self._attention('self')(modulated(self._norm(x), shift, scale), rotate=rotate)
    x = x + gate * dropout(y)
    y = nn.RMSNorm(dtype=self.dtype, name='cross_norm')(x)
    x = x + dropout(self._attention('cross', nn.initializers.zeros)(y, text, mask=text_mask))
    y = Mlp(self.mlp_dim, self.hidden_dim, 'silu', gated=True, dropout_rate=self.dropout_rate,
            dtype=self.dtype, name='mlp')(
                modulated(self._norm(x), mlp_shift, mlp_scale), deterministic=deterministic)
    return x + mlp_gate * dropout(y)

  def _norm(self, x):
    return nn.RMSNorm(dtype=self.dtype, use_scale=False)(x)

  def _attention(self, name, out_init=None):
    return MultiHeadAttention(self.num_heads, self.head_dim, self.hidden_dim,
                              dtype=self.dtype, implementation=self.attention, out_init=out_init,
                              query_key_norm=True, name=name)


def modulated(x: Float[Array, 'B N D'], shift: Float[Array, 'B 1 D'], scale: Float[Array, 'B 1 D']
              ) -> Float[Array, 'B N D']:
  """x * (1 + scale) + shift, for x [B, N, D], shift and scale [B, 1, D]."""
  return x * (1 + scale) + shift


def to_blocks(images: Float[Array, 'B H W C'], side: int
              ) -> Float[Array, 'B H//{side} W//{side} {side}*{side}*C']:
  """Splits [B, H, W, C] into flattened squares: [B, H/side, W/side, side * side * C]."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, -1)


def from_blocks(blocks: Float[Array, 'B rows columns values'], side: int
                ) -> Float[Array, 'B rows*{side} columns*{side} C']:
  """The inverse of to_blocks."""
  batch, rows, columns, values = blocks.shape
  x = blocks.reshape(batch, rows, columns, side, side, values // side ** 2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, -1)


def to_windows(images: Float[Array, 'B H W C'], side: int
               ) -> Float[Array, 'B H//{side} W//{side} 4*{side}*{side}*C']:
  """Flattened squares of twice the side, each centred on one of to_blocks, zero-padded.

  [B, H, W, C] -> [B, H/side, W/side, 4 * side * side * C].
  """
  half = side // 2
  x = to_blocks(jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0))), side)
  return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], axis=-1)


def from_windows(windows: Float[Array, 'B rows columns values'], side: int
                 ) -> Float[Array, 'B rows*{side} columns*{side} C']:
  """Adds up overlapping squares to pictures [B, H, W, C]: the transpose of to_windows."""
  half, corners = side // 2, ((0, 1), (1, 0))
  quarters = jnp.split(windows, 4, axis=-1)
  x = sum(jnp.pad(quarter, ((0, 0), rows, columns, (0, 0))) for quarter, (rows, columns) in zip(
      quarters, itertools.product(corners, corners)))
  return from_blocks(x, side)[:, half:-half, half:-half]


PRESETS = {
    'tiny': dict(patch_size=4, hidden_dim=128, mlp_dim=256, num_heads=4, num_layers=5,
                 bottleneck_dim=96),
    'small': dict(patch_size=8, hidden_dim=384, mlp_dim=1024, num_heads=6, num_layers=12,
                  bottleneck_dim=64),
    'base': dict(patch_size=16, hidden_dim=768, mlp_dim=2048, num_heads=12, num_layers=12,
                 bottleneck_dim=128),
    'large': dict(patch_size=16, hidden_dim=1024, mlp_dim=2816, num_heads=16, num_layers=24,
                  bottleneck_dim=128),
    'xl': dict(patch_size=16, hidden_dim=1280, mlp_dim=3456, num_heads=16, num_layers=32,
               bottleneck_dim=256),
}


@PARTS.register('denoiser', options=WIDTHS | {'patch_size': size('Side of a patch in pixels.')},
                slot='denoiser', presets=PRESETS, sharding=(
    (r'modulation/kernel$', ('fsdp', 'tensor')), (r'modulation/bias$', (('tensor', 'fsdp'),)),
    (r'context_embedding$', ())))
class Denoiser(nn.Module):
  """Maps noisy pictures to the prediction target (by default the clean picture).

  Attributes:
    image_size: (H, W), pixels.
    patch_size: P, pixels.
    hidden_dim: D.
    mlp_dim: width inside the MLPs.
    num_heads: attention heads.
    head_dim: width of a head, a multiple of 4; None: D / num_heads.
    num_layers: L.
    bottleneck_dim: width between the two linear layers of the patch embedding.
    patches: 'plain' as in JiT, or 'overlap': each token reads and writes a square of twice the
      patch's side, which avoids seams.
    context_tokens: number of tokens before the patches that carry the pooled text.
    dropout_rate: dropout on each sublayer, in training.
    attention: kernel, see `attention.attention`.
    remat, scan_unroll: see `layers.scan_layers`.
  """

  image_size: tuple[int, int]
  patch_size: int
  hidden_dim: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  bottleneck_dim: int
  patches: str = 'plain'
  context_tokens: int = 4
  dropout_rate: float = 0.0
  attention: str = 'xla'
  remat: str = 'none'
  scan_unroll: int = 1
  head_dim: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check(self)

  @nn.compact
  def __call__(self, z: Float[Array, 'B H W 3'], t: Float[Array, ' B'],
               text: Float[Array, 'B T C'], text_mask: Bool[Array, 'B T'], *,
               deterministic: bool = True) -> Float[Array, 'B H W 3']:
    """Predicts from noisy pictures; computes in the text's dtype, the output layer in float32.

    Args:
      z: float [B, H, W, 3], pixels in -1..1 mixed with noise.
      t: float [B], from 0 (noise) to 1 (picture).
      text: [B, T, C], the tokens of a text tower.
      text_mask: bool [B, T], False for padding.
      deterministic: no dropout.

    Returns:
      float32 [B, H, W, 3].
    """
    dtype, width = text.dtype, self.hidden_dim
    counts = text_mask[..., None].astype(dtype)
    pooled = (text * counts).sum(1) / jnp.maximum(counts.sum(1), 1)
    pooled = nn.Dense(width, dtype=dtype, name='pooled_projection')(pooled)
    text = nn.Dense(width, dtype=dtype, name='text_projection')(text)
    time = Mlp(width, width, 'silu', dtype=dtype, name='time')(_waves(t).astype(dtype))
    condition = time + pooled

    x, grid = self._tokens(z.astype(dtype), dtype)
    context = self.param('context_embedding', nn.initializers.normal(0.02),
                         (self.context_tokens, width)).astype(dtype)
    x = jnp.concatenate([pooled[:, None] + context, x], axis=1)
    head_dim = head_width('denoiser', self)
    rotate = rotary(grid, self.context_tokens, head_dim)
    mask = text_mask[:, None, None, :]
    layer = DenoiserLayer(width, self.mlp_dim, self.num_heads, head_dim, self.dropout_rate,
                          self.attention, dtype, name='layers')
    x, _ = scan_layers(
        lambda layer, x, _: (layer(x, condition, text, mask, rotate, deterministic=deterministic),
                             None),
        layer, x, num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    return self._pixels(x[:, self.context_tokens:], condition, grid)

  def _tokens(self, z, dtype):
    """Patch tokens [B, N, D], and their grid (rows, columns).

    The bottleneck helps because pictures lie on a low-dimensional manifold (JiT, section 4.3).
    """
    squares = (to_windows if self.patches == 'overlap' else to_blocks)(z, self.patch_size)
    init = functools.partial(_low_frequencies, patch_size=self.patch_size)
    x = nn.Dense(self.bottleneck_dim, use_bias=False, dtype=dtype, kernel_init=init,
                 name='stem_down')(squares)
    x = nn.Dense(self.hidden_dim, dtype=dtype, name='stem_up')(x)
    grid = x.shape[1:3]
    return GridPosition(name='position')(x.reshape(x.shape[0], -1, self.hidden_dim), grid), grid

  def _pixels(self, x, condition, grid):
    """Maps tokens [B, N, D] to pixels, float32 [B, H, W, 3].

    In float32 for any token dtype: a picture's error is divided by the remaining time 1 - t (see
    flow.LEAST), so bfloat16, with 8 bits, would cause an error of a tenth in the velocity.
    """
    dtype = jnp.float32
    parts = nn.Dense(2 * self.hidden_dim, dtype=dtype, kernel_init=nn.initializers.zeros,
                     name='final_modulation')(nn.silu(condition))[:, None]
    x = modulated(nn.RMSNorm(dtype=dtype, use_scale=False)(x), *jnp.split(parts, 2, axis=-1))
    overlap = self.patches == 'overlap'
    pixels = (4 if overlap else 1) * self.patch_size ** 2
    x = nn.Dense(3 * pixels, dtype=dtype, kernel_init=nn.initializers.zeros,
                 name='pixel_projection')(x).reshape(x.shape[0], *grid, -1)
    return (from_windows if overlap else from_blocks)(x, self.patch_size)


def _low_frequencies(rng, shape, dtype=jnp.float32, *, patch_size):
  """Kernel initialiser: cosine waves over the squares of _tokens, per channel, low ones larger.

  Low frequencies carry most of the visible signal of a noisy picture. The total
  norm is that of random kernels.
  """
  del rng
  values, count = shape
  side = math.isqrt(values // 3)
  n = np.arange(side)
  wave = np.cos(np.pi * n[:, None] * (n + 0.5) / side)
  wave /= np.linalg.norm(wave, axis=1, keepdims=True)
  waves = np.einsum('ai,bj,cd->abcijd', wave, wave, np.eye(3)).reshape(values, side, side, 3)
  frequency = np.repeat(np.hypot(n[:, None], n).ravel(), 3)
  waves = waves / (1 + frequency[:, None, None, None]) ** 2
  kernel = np.asarray(to_blocks(waves[np.argsort(frequency, kind='stable')], patch_size))
  kernel = np.resize(kernel.reshape(values, values), (count, values)).T
  return jnp.asarray(kernel * (count / (kernel ** 2).sum()) ** 0.5, dtype)


def check(sizes: Denoiser) -> None:
  """Raises UserError if sizes do not divide or do not fit the kind of patches."""
  for key in ('patch_size', 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
    if getattr(sizes, key) < 1:
      raise UserError(f'config.model.denoiser.{key}={getattr(sizes, key)}: wanted 1 or more')
  if any(side % sizes.patch_size for side in sizes.image_size):
    raise UserError(f'config.data.image_size={sizes.image_size[0]} does not divide into patches of '
                    f'config.model.denoiser.patch_size={sizes.patch_size}; use a multiple of it')
  if sizes.head_dim and sizes.head_dim % 4:
    raise UserError(f'config.model.denoiser.head_dim={sizes.head_dim}: rotary positions want a '
                    'multiple of 4')
  if not sizes.head_dim and sizes.hidden_dim % (4 * sizes.num_heads):
    raise UserError(f'config.model.denoiser: hidden_dim={sizes.hidden_dim} does not divide into '
                    f'num_heads={sizes.num_heads} heads with a multiple of 4 in each, which rotary '
                    'positions want')
  if sizes.patches not in PATCHES:
    raise UserError(f'config.generation.patches={sizes.patches!r}: wanted {" or ".join(PATCHES)}')
  if sizes.patches == 'overlap' and sizes.patch_size % 2:
    raise UserError("config.generation.patches='overlap' wants an even "
                    f"config.model.denoiser.patch_size, found {sizes.patch_size}; use 'plain'")


def _waves(t):
  """Sines and cosines of times [B] in 0..1: float32 [B, 2 * _TIME_WAVES]."""
  angles = t[:, None].astype(jnp.float32) * jnp.geomspace(*_TIME_RADIANS, _TIME_WAVES)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
