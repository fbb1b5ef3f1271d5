"""A closer look at the pixels around boxes."""

import math

import jax
import jax.numpy as jnp

from xmodal.models.detector.boxes import to_center


def glimpse(pixels, boxes, cells: int, extent=None, zoom: float = 1.4):
  """Pictures [B, H, W, C] around each of their boxes: [B, N, cells, cells, C].

  What is seen is `zoom` times as wide and high as the box, corners float32
  [B, N, 4] in 0..1 of the input. Each cell is read bilinearly at its middle, from the
  picture halved so often that its pixels are about as large as the cell (a mipmap:
  Williams, Pyramidal parametrics, 1983), so the cost does not grow with the picture's
  size. Cells beyond the picture's edges, or beyond its extent, int32 [B, 2] (height,
  width) in pixels, are 0. No gradient goes to the boxes.
  """
  height, width = pixels.shape[1:3]
  if extent is None:
    extent = jnp.array([[height, width]])
  halvings = max(round(math.log2(zoom * max(height, width) / cells)), 0)
  levels = _pyramid(pixels, extent, halvings)
  grids = jnp.array([level.shape[1:3] for level in levels])
  starts = jnp.cumsum(grids.prod(1)) - grids.prod(1)
  flat = jnp.concatenate([level.reshape(len(level), -1, level.shape[-1]) for level in levels], 1)

  center, size = jnp.split(
      to_center(jax.lax.stop_gradient(boxes)) * jnp.array([width, height] * 2), 2, axis=-1)
  cell = zoom * jnp.sqrt(size.prod(-1)) / cells  # side of a cell in pixels, [B, N]
  level = jnp.clip(jnp.round(jnp.log2(jnp.maximum(cell, 1))), 0, halvings).astype(jnp.int32)
  places = center[..., None] + zoom * size[..., None] * ((jnp.arange(cells) + 0.5) / cells - 0.5)

  def taps(axis):
    """Two neighbours of each cell's middle and their weights: [B, N, cells, 2]."""
    middle, limit = places[..., axis, :], extent[:, 1 - axis, None, None]
    inside = (middle > 0) & (middle < limit)
    middle = middle / 2**level[..., None] - 0.5
    first = jnp.floor(middle)
    weight = jnp.stack([first + 1 - middle, middle - first], axis=-1) * inside[..., None]
    last = -(-limit // 2**level[..., None]) - 1
    index = first[..., None].astype(jnp.int32) + jnp.arange(2)
    return jnp.clip(index, 0, last[..., None]), weight.astype(pixels.dtype)

  (column, across), (row, down) = taps(0), taps(1)
  columns = grids[level, 1][..., None, None, None, None]
  index = (starts[level][..., None, None, None, None]
           + row[:, :, :, None, :, None] * columns + column[:, :, None, :, None, :])
  seen = jax.vmap(lambda values, index: values[index])(flat, index)
  return jnp.einsum('bnyxvhc,bnyv,bnxh->bnyxc', seen, down, across)


def _pyramid(pixels, extent, halvings):
  """Pictures [B, H, W, C] as they are, then halved repeatedly: means of 2x2 that are picture."""
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
  return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).sum((2, 4))
