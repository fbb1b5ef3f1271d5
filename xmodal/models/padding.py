"""Which part of an input is picture and which is padding, at any resolution of a vision tower."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Padding:
  """Inputs of a size, each with a picture at the top left and padding to its right and below.

  A cell of a feature map counts as picture if its first pixel does: where
  torch's nearest interpolation of a pixel mask says so, as in DETR
  (arXiv:2005.12872).

  Attributes:
    extent: int32 [B, 2], (height, width) of the pictures in pixels; None: there is
      no padding, and nothing here computes anything.
    size: (H, W) of the inputs, in pixels.
  """

  extent: jax.Array | None
  size: tuple[int, int]

  def mask(self, grid: tuple[int, int]) -> jax.Array | None:
    """Which cells of a grid of (rows, columns) are picture: bool [B, rows, columns], or None."""
    if self.extent is None:
      return None
    rows, columns = (jnp.arange(cells) * pixels < self.extent[:, i, None] * cells
                     for i, (cells, pixels) in enumerate(zip(grid, self.size)))
    return rows[:, :, None] & columns[:, None]

  def token_mask(self, grid: tuple[int, int], extra: int) -> jax.Array | None:
    """The same in a row, after `extra` tokens that lie nowhere: bool [B, extra + N], or None."""
    mask = self.mask(grid)
    if mask is None:
      return None
    return jnp.pad(mask.reshape(len(mask), -1), ((0, 0), (extra, 0)), constant_values=True)

  def mask_like(self, x: jax.Array) -> jax.Array | None:
    """The mask of a feature map [B, H', W', C], in its shape."""
    mask = self.mask(x.shape[1:3])
    return None if mask is None else jnp.broadcast_to(mask[..., None], x.shape)

  def clear(self, x: jax.Array) -> jax.Array:
    """A feature map [B, H', W', C] with zeros in the padding, as beyond the edge of an input."""
    mask = self.mask_like(x)
    return x if mask is None else jnp.where(mask, x, 0)
