"""Names that a task looks for in every picture, as vectors from the text tower.

They are data of a program, not part of it: it is compiled for a number of names, not for names.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np

_LEAST_ROWS, _LEAST_TOKENS = 8, 16  # of padded names


@flax.struct.dataclass
class Names:
  """K names.

  Attributes:
    tokens: int32 [K, L], padded to one length.
    counts: bool [K], False for rows that are no name or are left out of a training step; None: all
      are names. What is predicted for a row that does not count means nothing.
    vectors: [K, D], from the text tower; None: not read yet.
    end_token: whether the vector of a name includes the token that ends it.
    most_read: rows that are read if no more count; 0: all.
  """

  tokens: jax.Array | np.ndarray
  counts: jax.Array | np.ndarray | None = None
  vectors: jax.Array | None = None
  end_token: bool = flax.struct.field(pytree_node=False, default=True)
  most_read: int = flax.struct.field(pytree_node=False, default=0)


def program_size(number: int, least: int = _LEAST_ROWS) -> int:
  """The next power of two, or `least`: sizes that few compiled programs serve."""
  return max(least, 1 << max(number - 1, 0).bit_length())


def pad_names(names: Names, pad_id: int, longest: int | None = None) -> Names:
  """The same names in arrays of a size that few programs serve; the rows added do not count.

  Args:
    names: numpy arrays.
    pad_id: token number that is no text.
    longest: tokens that the text tower can read; None: any number.
  """
  number, length = names.tokens.shape
  rows, columns = program_size(number), program_size(length, _LEAST_TOKENS)
  columns = max(length, min(columns, longest or columns))
  tokens = np.full((rows, columns), pad_id, np.int32)
  tokens[:, :length] = names.tokens[0]  # a text with no token has no mean
  tokens[:number, :length] = names.tokens
  counts = np.ones(number, bool) if names.counts is None else names.counts
  return names.replace(tokens=tokens, counts=np.pad(counts, (0, rows - number)))


def names_present(names: jax.Array, number: int) -> jax.Array:
  """Which of `number` names objects have, bool [number]; names: int32 [B, M], -1 for no object."""
  place = jnp.where(names >= 0, names, number)  # a place out of range is dropped
  return jnp.zeros(number, bool).at[place].set(True, mode='drop')


def sample_names(names: Names, present: jax.Array, most: int, key: jax.Array) -> Names:
  """Leaves out absent names at random, so that `most` are left, or those that are present.

  The federated loss of open-vocabulary detectors (Detic, arXiv:2201.02605), with equal chances.

  Args:
    names: K names, all of which count.
    present: bool [K], of the names that the batch has.
    most: names that are left if no more are present.
    key: of the random choice, which depends on nothing else.
  """
  if len(names.tokens) <= most:
    return names
  _, chosen = jax.lax.top_k(jnp.where(present, 2.0, jax.random.uniform(key, present.shape)), most)
  return names.replace(counts=present | jnp.zeros_like(present).at[chosen].set(True),
                       most_read=most)


def read_names(names: Names, encode: Callable, params) -> tuple[jax.Array, Callable]:
  """Vectors of names and the way back, as jax.vjp gives them.

  Args:
    names: K names.
    encode: (params, tokens int32 [N, L]) -> vectors [N, D].
    params: that a gradient is wanted of.

  Returns:
    Vectors [K, D], zeros for names that do not count where not all are read; and a function of the
    gradient of a loss at the vectors that gives a tuple of its gradient at the parameters.
  """
  if not names.most_read:
    return jax.vjp(lambda params: encode(params, names.tokens), params)
  tokens = jnp.asarray(names.tokens)

  def some(params):
    # Where fewer count, the last rows are copies that are written nowhere.
    rows = jnp.nonzero(names.counts, size=names.most_read, fill_value=len(tokens))[0]
    vectors = encode(params, jnp.take(tokens, rows, axis=0, mode='clip'))
    return jnp.zeros((len(tokens), vectors.shape[-1]), vectors.dtype).at[rows].set(
        vectors, mode='drop')

  def every(params):
    return encode(params, tokens)

  # A batch can have more names than are to be read, and none of them may be left out.
  fits = names.counts.sum() <= names.most_read

  def backward(gradient):
    # The vectors are computed again. A gradient through jax.lax.cond would keep what both branches
    # need, in every step.
    return (jax.lax.cond(fits, *(
        lambda params, way=way: jax.vjp(way, params)[1](gradient)[0] for way in (some, every)),
        params),)

  return jax.lax.cond(fits, some, every, params), backward
