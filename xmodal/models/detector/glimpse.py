"""Crops of the pixels around boxes."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xmodal.models.detector.boxes import to_center


def glimpse(pixels: Float[Array, 'B H W C'], boxes: Float[Array, 'B N 4'], cells: int,
            extent: Int[Array, 'B 2'] | None = None, zoom: float = 1.4
            ) -> Float[Array, 'B N {cells} {cells} C']:
  """Crops pictures [B, H, W, C] around each of their boxes: [B, N, cells, cells, C].

  A crop is `zoom` times as wide and high as its box. Each cell is sampled bilinearly at
  its centre, from the level of a mipmap (Williams, Pyramidal parametrics, 1983) whose
  pixels are about as large as the cell; the cost thus does not grow with the picture's size.

  Args:
    pixels: [B, H, W, C].
    boxes: float32 [B, N, 4], corners in 0..1 of the input; they receive no gradient.
    cells: rows and columns of a crop.
    extent: int32 [B, 2], (height, width) of the pictures in pixels; None: no padding.
      Cells outside of it are 0.
    zoom: side of a crop relative to its box.
  """
  height, width = pixels.shape[1:3]
  if extent is None:
    extent = jnp.array([[height, width]])
  halvings = max(round(math.log2(zoom * max(height, width) / cells)), 0)
  levels = _pyramid(pixels, extent, halvings)
  grids = jnp.array([level.shape[1:3] for level in levels])
  starts = jnp.cumsum(grids.prod(1)) - grids.prod(1)
  flat = jnp.concatenate(
      [level.reshape(level.shape[0], -1, level.shape[-1]) for level in levels], 1)

  center, size = jnp.split(
      to_center(jax.lax.stop_gradient(boxes)) * jnp.array([width, height] * 2), 2, axis=-1)
  cell = zoom * jnp.sqrt(size.prod(-1)) / cells  # side of a cell in pixels, [B, N]
  level = jnp.clip(jnp.round(jnp.log2(jnp.maximum(cell, 1))), 0, halvings).astype(jnp.int32)
  places = center[..., None] + zoom * size[..., None] * ((jnp.arange(cells) + 0.5) / cells - 0.5)

  # Looked up: a power of 2 becomes a shift, which ONNX has for unsigned numbers alone.
  sides = jnp.array([2**halving for halving in range(halvings + 1)])[level][..., None]

  def taps(axis):
    """Indices and weights of the two neighbours of each cell's centre: [B, N, cells, 2]."""
    middle, limit = places[..., axis, :], extent[:, 1 - axis, None, None]
    inside = (middle > 0) & (middle < limit)
    middle = middle / sides - 0.5
    first = jnp.floor(middle)
    weight = jnp.stack([first + 1 - middle, middle - first], axis=-1) * inside[..., None]
    last = -(-limit // sides) - 1
    index = first[..., None].astype(jnp.int32) + jnp.arange(2)
    return jnp.clip(index, 0, last[..., None]), weight.astype(pixels.dtype)

  (column, across), (row, down) = taps(0), taps(1)
  columns = grids[level, 1][..., None, None, None, None]
  index = (starts[level][..., None, None, None, None]
           + row[:, :, :, None, :, None] * columns + column[:, :, None, :, None, :])
  seen = jax.vmap(lambda values, index: values[index])(flat, index)
  return jnp.einsum('bnyxvhc,bnyv,bnxh->bnyxc', seen, down, across)


def _pyramid(pixels, extent, halvings):
  """Pictures [B, H, W, C], then repeatedly halved ones: 2x2 means that exclude padding."""
  height, width = pixels.shape[1:3]
  real = ((jnp.arange(height)[:, None] < extent[:, 0, None, None])
          & (jnp.arange(width) < extent[:, 1, None, None]))[..., None].astype(pixels.dtype)
  sums, counts, levels = pixels * real, real, [pixels]
  for _ in range(halvings):
    sums, counts = _sum_of_four(sums), _sum_of_four(counts)
    levels.append(sums / jnp.maximum(counts, 1))
  return levels


def _sum_of_four(x):
  x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
  return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).sum((2, 4))
