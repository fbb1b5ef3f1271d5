"""What a tower gives."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Stream:
  """Tokens of one input.

  Attributes:
    tokens: [B, N, D].
    mask: bool [B, N], False for padding; None: there is none.
    grid: (rows, columns) on which the last rows * columns of the tokens lie; None: on none.
  """

  tokens: jax.Array
  mask: jax.Array | None = None
  grid: tuple[int, int] | None = None

  @property
  def full_mask(self) -> jax.Array:
    """The mask, bool [B, N], where there is no padding too."""
    return jnp.ones(self.tokens.shape[:2], bool) if self.mask is None else self.mask


def concatenate(*streams: Stream) -> Stream:
  """Streams of one width, one after the other, on the grid of the last."""
  if len(streams) == 1:
    return streams[0]
  mask = None
  if any(stream.mask is not None for stream in streams):
    mask = jnp.concatenate([stream.full_mask for stream in streams], axis=1)
  return Stream(jnp.concatenate([stream.tokens for stream in streams], axis=1), mask,
                streams[-1].grid)
