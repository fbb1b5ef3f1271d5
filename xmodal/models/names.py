"""Names that a task looks for in every picture, as vectors from the text tower.

Names are inputs of a compiled program: it is compiled for a number of names and serves any names.
"""

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

_LEAST_ROWS, _LEAST_TOKENS = 8, 16  # minimum sizes of padded names


@flax.struct.dataclass
class Names:
  """K names.

  Attributes:
    tokens: int32 [K, L], padded to one length.
    counts: bool [K], False for padding rows and for names left out of a training step; None: all
      count. Predictions for other rows are undefined.
    vectors: [K, D], from the text tower; None: not encoded yet.
    end_token: whether a name's vector includes its end token.
    most_read: rows to encode, unless more count; 0: all.
  """

  tokens: jax.Array | np.ndarray
  counts: jax.Array | np.ndarray | None = None
  vectors: jax.Array | None = None
  end_token: bool = flax.struct.field(pytree_node=False, default=True)
  most_read: int = flax.struct.field(pytree_node=False, default=0)


def program_size(number: int, least: int = _LEAST_ROWS) -> int:
  """The next power of two, at least `least`, to limit the number of compiled programs."""
  return max(least, 1 << max(number - 1, 0).bit_length())


def pad_names(names: Names, pad_id: int, longest: int | None = None) -> Names:
  """Pads names to a size from program_size; the added rows do not count.

  Args:
    names: the names, as numpy arrays.
    pad_id: id of the pad token.
    longest: maximum number of tokens of the text tower; None: unlimited.
  """
  number, length = names.tokens.shape
  rows, columns = program_size(number), program_size(length, _LEAST_TOKENS)
  columns = max(length, min(columns, longest or columns))
  tokens = np.full((rows, columns), pad_id, np.int32)
  tokens[:, :length] = names.tokens[0]  # an empty text has no mean
  tokens[:number, :length] = names.tokens
  counts = np.ones(number, bool) if names.counts is None else names.counts
  return names.replace(tokens=tokens, counts=np.pad(counts, (0, rows - number)))


def names_present(names: Int[Array, 'B M'], number: int) -> Bool[Array, ' {number}']:
  """Mask of the names of a batch's objects, bool [number]; names: int32 [B, M], -1 for no object.
  """
  place = jnp.where(names >= 0, names, number)  # an index out of range is dropped
  return jnp.zeros(number, bool).at[place].set(True, mode='drop')


def sample_names(names: Names, present: Bool[Array, ' K'], most: int, key: Key[Array, '']) -> Names:
  """Samples `most` names: all present ones, and absent ones at random.

  The federated loss of open-vocabulary detectors (Detic, arXiv:2201.02605), with equal
  probabilities. If more than `most` are present, all of these are kept.

  Args:
    names: K names, all of which count.
    present: bool [K], the names of the batch's objects.
    most: number of names to keep.
    key: random key.
  """
  if len(names.tokens) <= most:
    return names
  _, chosen = jax.lax.top_k(jnp.where(present, 2.0, jax.random.uniform(key, present.shape)), most)
  return names.replace(counts=present | jnp.zeros_like(present).at[chosen].set(True),
                       most_read=most)


def read_names(names: Names, encode: Callable, params) -> tuple[Float[Array, 'K D'], Callable]:
  """Vectors of names and their backward function, like jax.vjp.

  Args:
    names: K names.
    encode: (params, tokens int32 [N, L]) -> vectors [N, D].
    params: the parameters to differentiate.

  Returns:
    Vectors [K, D], zeros for names that do not count unless all are encoded; and a function that
    maps a loss's gradient at the vectors to a tuple with its gradient at the parameters.
  """
  if not names.most_read:
    return jax.vjp(lambda params: encode(params, names.tokens), params)
  tokens = jnp.asarray(names.tokens)

  def some(params):
    # If fewer count, the last rows are copies, whose vectors are dropped.
    rows = jnp.nonzero(names.counts, size=names.most_read, fill_value=len(tokens))[0]
    vectors = encode(params, jnp.take(tokens, rows, axis=0, mode='clip'))
    return jnp.zeros((len(tokens), vectors.shape[-1]), vectors.dtype).at[rows].set(
        vectors, mode='drop')

  def every(params):
    return encode(params, tokens)

  # If a batch has more names than most_read, all must be encoded.
  fits = names.counts.sum() <= names.most_read

  def backward(gradient):
    # Recomputes the vectors. Differentiating jax.lax.cond would keep the residuals of both branches
    # in every step.
    return (jax.lax.cond(fits, *(
        lambda params, way=way: jax.vjp(way, params)[1](gradient)[0] for way in (some, every)),
        params),)

  return jax.lax.cond(fits, some, every, params), backward
