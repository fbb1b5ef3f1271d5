"""The output of a tower."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Stream:
  """Tokens of one input.

  Attributes:
    tokens: [B, N, D].
    mask: bool [B, N], False for padding; None: no padding.
    grid: (rows, columns) of the last rows * columns tokens; None: the tokens form no grid.
  """

  tokens: Float[Array, 'B N D']
  mask: Bool[Array, 'B N'] | None = None
  grid: tuple[int, int] | None = None

  @property
  def full_mask(self) -> Bool[Array, 'B N']:
    """The mask, bool [B, N]; all True if there is no padding."""
    return jnp.ones(self.tokens.shape[:2], bool) if self.mask is None else self.mask


def concatenate(*streams: Stream) -> Stream:
  """Concatenates streams of equal width along their tokens; the grid is that of the last."""
  if len(streams) == 1:
    return streams[0]
  mask = None
  if any(stream.mask is not None for stream in streams):
    mask = jnp.concatenate([stream.full_mask for stream in streams], axis=1)
  return Stream(jnp.concatenate([stream.tokens for stream in streams], axis=1), mask,
                streams[-1].grid)
