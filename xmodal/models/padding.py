"""Masks of the padding around pictures, at any resolution of a vision tower."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True)
class Padding:
  """Inputs of one size, each with a picture at the top left and padding to its right and below.

  A cell of a feature map belongs to the picture if its first pixel does. This equals
  torch's nearest interpolation of a pixel mask, which DETR uses (arXiv:2005.12872).

  Attributes:
    extent: int32 [B, 2], (height, width) of the pictures in pixels; None: no padding,
      and the methods compute nothing.
    size: (H, W) of the inputs, in pixels.
  """

  extent: Int[Array, 'B 2'] | None
  size: tuple[int, int]

  def mask(self, grid: tuple[int, int]) -> Bool[Array, 'B {grid[0]} {grid[1]}'] | None:
    """Mask of the picture's cells on a grid of (rows, columns): bool [B, rows, columns], or None.
    """
    if self.extent is None:
      return None
    rows, columns = (jnp.arange(cells) * pixels < self.extent[:, i, None] * cells
                     for i, (cells, pixels) in enumerate(zip(grid, self.size)))
    return rows[:, :, None] & columns[:, None]

  def token_mask(self, grid: tuple[int, int], extra: int
                 ) -> Bool[Array, 'B {extra+grid[0]*grid[1]}'] | None:
    """The mask of `extra` tokens without position, then the grid's: bool [B, extra + N], or None.
    """
    mask = self.mask(grid)
    if mask is None:
      return None
    return jnp.pad(mask.reshape(mask.shape[0], -1), ((0, 0), (extra, 0)), constant_values=True)

  def mask_like(self, x: Float[Array, 'B rows columns C'] | UInt8[Array, 'B rows columns C']
                ) -> Bool[Array, 'B rows columns C'] | None:
    """The mask of a feature map [B, H', W', C], broadcast to its shape; None: no padding."""
    mask = self.mask(x.shape[1:3])
    return None if mask is None else jnp.broadcast_to(mask[..., None], x.shape)

  def clear(self, x: Float[Array, 'B rows columns C'] | UInt8[Array, 'B rows columns C']
            ) -> Float[Array, 'B rows columns C'] | UInt8[Array, 'B rows columns C']:
    """Sets the padding of a feature map [B, H', W', C] to zero, like beyond an input's edge."""
    mask = self.mask_like(x)
    return x if mask is None else jnp.where(mask, x, 0)
