"""A plain transformer over patches that cleans a noisy picture, told a text and how noisy it is.

After JiT (arXiv:2511.13720, section 4): patches through a bottleneck, RMS norms, SwiGLU, rotary
positions, normed queries and keys, adaLN-Zero for the time (arXiv:2212.09748), and a few tokens in
the context that say what is wanted. The text is looked at by cross-attention, too.
"""

import functools
import itertools
import math

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.joint import GridPosition
from xmodal.models.layers import Mlp, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, size

PATCHES = ('overlap', 'plain')
_TIME_WAVES = 64
# Radians over all times, of the slowest and the fastest wave: what is learned at one time is known
# at those near it. (Waves of up to 1000 tell 0.500 from 0.505 as if they were far apart.)
_TIME_TURNS = (0.5, 30.0)
# Of the slowest rotary wave, in patches: far longer than any picture.
_SLOWEST = 100.0


def rotary(grid: tuple[int, int], extra: int, head_dim: int):
  """A function that turns queries or keys by row and column (arXiv:2104.09864, in two dimensions).

  Args:
    grid: (rows, columns) of the tokens that lie on it, in rows.
    extra: tokens before those that lie nowhere, and are not turned.
    head_dim: a multiple of 4; half of it is turned by the row, half by the column.

  Returns:
    [B, extra + rows * columns, H, head_dim] -> the same: products of a query and a key hang on
    how far apart the two are.
  """
  row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  frequencies = _SLOWEST ** -(np.arange(head_dim // 4) / (head_dim // 4))
  angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=1)
  angles = np.pad(angles, ((extra, 0), (0, 0)))[:, None]
  cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))

  def rotate(x):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)

  return rotate


class DenoiserLayer(nn.Module):
  """Self-attention, a look at the text, and an MLP: [B, N, D] -> [B, N, D].

  The time says how the first and the last are scaled, shifted and let through; the layer begins
  as the identity. Attributes as in Denoiser.
  """

  hidden_dim: int
  mlp_dim: int
  num_heads: int
  dropout_rate: float
  attention: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, condition, text, text_mask, rotate, *, deterministic):
    """x [B, N, D], condition [B, D], text [B, L, D], text_mask bool [B, 1, 1, L] -> x, updated."""
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
    return MultiHeadAttention(self.num_heads, self.hidden_dim // self.num_heads, self.hidden_dim,
                              dtype=self.dtype, implementation=self.attention, out_init=out_init,
                              query_key_norm=True, name=name)


def modulated(x, shift, scale):
  """x [B, ..., D] by shift and scale [B, 1.., D]; zeros leave it as it is."""
  return x * (1 + scale) + shift


def blocks_of(images, side):
  """[B, H, W, C] -> squares of that side, each in a row: [B, H/side, W/side, side * side * C]."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, -1)


def images_of(blocks, side):
  """The inverse of blocks_of."""
  batch, rows, columns, values = blocks.shape
  x = blocks.reshape(batch, rows, columns, side, side, values // side ** 2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, -1)


def windows_of(images, side):
  """Squares of twice the side, with one of those of blocks_of in the middle of each:
  [B, H, W, C] -> [B, H/side, W/side, 4 * side * side * C]. Beyond the edges there are zeros."""
  half = side // 2
  x = blocks_of(jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0))), side)
  return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], axis=-1)


def sum_of_windows(windows, side):
  """The picture that such squares add up to, where they overlap: the transpose of windows_of."""
  half, corners = side // 2, ((0, 1), (1, 0))
  quarters = jnp.split(windows, 4, axis=-1)
  x = sum(jnp.pad(quarter, ((0, 0), rows, columns, (0, 0))) for quarter, (rows, columns) in zip(
      quarters, itertools.product(corners, corners)))
  return images_of(x, side)[:, half:-half, half:-half]


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
  """Noisy pictures to what is predicted of them (the clean picture, as a rule).

  Attributes:
    image_size: (H, W), pixels.
    patch_size: P, pixels.
    hidden_dim: D.
    mlp_dim: width inside the MLPs.
    num_heads: heads of D / num_heads each, a multiple of 4.
    num_layers: L.
    bottleneck_dim: width between the two linear layers that a patch goes through.
    patches: 'plain' as in JiT, or 'overlap': each token reads and writes the pixels around its
      patch, too, in a square of twice the side, so that there are no seams.
    context_tokens: tokens before those of the patches, which say what the text says as a whole.
    dropout_rate: on each sublayer, in training.
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

  def __post_init__(self):
    super().__post_init__()
    check(self)

  @nn.compact
  def __call__(self, z, t, text, text_mask, *, deterministic=True):
    """What is predicted of noisy pictures; computes in the dtype of the text, last in float32.

    Args:
      z: float [B, H, W, 3], pixels in -1..1 and noise.
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
    rotate = rotary(grid, self.context_tokens, width // self.num_heads)
    mask = text_mask[:, None, None, :]
    layer = DenoiserLayer(width, self.mlp_dim, self.num_heads, self.dropout_rate, self.attention,
                          dtype, name='layers')
    x, _ = scan_layers(
        lambda layer, x, _: (layer(x, condition, text, mask, rotate, deterministic=deterministic),
                             None),
        layer, x, num_layers=self.num_layers, remat=self.remat, unroll=self.scan_unroll)
    return self._pixels(x[:, self.context_tokens:], condition, grid)

  def _tokens(self, z, dtype):
    """[B, N, D], and the grid that they lie on.

    Pictures fill little of the space of their pixels; a narrow layer helps (JiT, section 4.3).
    """
    squares = (windows_of if self.patches == 'overlap' else blocks_of)(z, self.patch_size)
    init = functools.partial(_low_frequencies, patch_size=self.patch_size)
    x = nn.Dense(self.bottleneck_dim, use_bias=False, dtype=dtype, kernel_init=init,
                 name='stem_down')(squares)
    x = nn.Dense(self.hidden_dim, dtype=dtype, name='stem_up')(x)
    grid = x.shape[1:3]
    return GridPosition(name='position')(x.reshape(len(x), -1, self.hidden_dim), grid), grid

  def _pixels(self, x, condition, grid):
    """float32 [B, H, W, 3] of tokens [B, N, D].

    In float32 whatever the dtype of the tokens: the error of a picture is divided by the time that
    is left (see flow.LEAST), so the 8 bits of bfloat16 would make a velocity wrong by a tenth.
    """
    dtype = jnp.float32
    parts = nn.Dense(2 * self.hidden_dim, dtype=dtype, kernel_init=nn.initializers.zeros,
                     name='final_modulation')(nn.silu(condition))[:, None]
    x = modulated(nn.RMSNorm(dtype=dtype, use_scale=False)(x), *jnp.split(parts, 2, axis=-1))
    overlap = self.patches == 'overlap'
    pixels = (4 if overlap else 1) * self.patch_size ** 2
    x = nn.Dense(3 * pixels, dtype=dtype, kernel_init=nn.initializers.zeros,
                 name='pixel_projection')(x).reshape(len(x), *grid, -1)
    return (sum_of_windows if overlap else images_of)(x, self.patch_size)


def _low_frequencies(rng, shape, dtype=jnp.float32, *, patch_size):
  """Cosine waves over the squares of _tokens, a channel each, the slower the louder.

  Of a picture in noise, most of what can be seen is in the slow ones. As loud
  as random kernels all in all.
  """
  del rng
  values, count = shape
  side = math.isqrt(values // 3)
  n = np.arange(side)
  wave = np.cos(np.pi * n[:, None] * (n + 0.5) / side)
  wave /= np.linalg.norm(wave, axis=1, keepdims=True)
  waves = np.einsum('ai,bj,cd->abcijd', wave, wave, np.eye(3)).reshape(values, side, side, 3)
  speed = np.repeat(np.hypot(n[:, None], n).ravel(), 3)
  loud = waves / (1 + speed[:, None, None, None]) ** 2
  kernel = np.asarray(blocks_of(loud[np.argsort(speed, kind='stable')], patch_size))
  kernel = np.resize(kernel.reshape(values, values), (count, values)).T
  return jnp.asarray(kernel * (count / (kernel ** 2).sum()) ** 0.5, dtype)


def check(sizes: Denoiser) -> None:
  """Raises UserError where sizes do not divide, or there are no such patches."""
  for key in ('patch_size', 'hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
    if getattr(sizes, key) < 1:
      raise UserError(f'config.model.denoiser.{key}={getattr(sizes, key)}: wanted 1 or more')
  if any(side % sizes.patch_size for side in sizes.image_size):
    raise UserError(f'config.data.image_size={sizes.image_size[0]} does not divide into patches of '
                    f'config.model.denoiser.patch_size={sizes.patch_size}; use a multiple of it')
  if sizes.hidden_dim % (4 * sizes.num_heads):
    raise UserError(f'config.model.denoiser: hidden_dim={sizes.hidden_dim} does not divide into '
                    f'num_heads={sizes.num_heads} heads with a multiple of 4 in each, which rotary '
                    'positions want')
  if sizes.patches == 'overlap' and sizes.patch_size % 2:
    raise UserError("config.generation.patches='overlap' wants an even "
                    f"config.model.denoiser.patch_size, found {sizes.patch_size}; use 'plain'")


def _waves(t):
  """Sines and cosines of times [B] in 0..1: float32 [B, 2 * _TIME_WAVES]."""
  angles = t[:, None].astype(jnp.float32) * jnp.geomspace(*_TIME_TURNS, _TIME_WAVES)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
