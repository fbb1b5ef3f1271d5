"""How a bundle stores parameters, by the name of a precision: one entry of PRECISIONS each.

An entry turns the model's parameters into the arrays of a file, and, inside the program, those
arrays back into parameters. XLA compiles the latter into the program, so that a device holds the
small arrays alone.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped
import ml_dtypes
import numpy as np

Stored = Mapping[str, np.ndarray]
_LEAST = 4096  # values of an array worth fewer bits: norms, biases and scales keep theirs
_SCALE = '#scale'  # ends the name of an array of scales


@dataclasses.dataclass(frozen=True)
class Precision:
  """One way to store parameters.

  Attributes:
    help: one sentence for --help.
    store: (parameters by path, 'params/backbone/...', numpy arrays) -> arrays to store by name.
      Every name begins with the path of its parameter; what follows a '#' tells apart several
      arrays of one parameter.
    restore: the way back, on the device: (arrays by name) -> parameters by path, float32 where
      they were.
    dtype: dtype of the computation on accelerators if config.model.dtype is auto; on CPUs it is
      float32.
  """

  help: str
  store: Callable[[Stored], Stored]
  restore: Callable[[Mapping[str, Shaped[Array, '...']]], Mapping[str, Shaped[Array, '...']]]
  dtype: str = 'bfloat16'


def _is_float(array):
  return jnp.issubdtype(array.dtype, jnp.floating)


def _to_bfloat16(parameters):
  return {path: array.astype(ml_dtypes.bfloat16) if _is_float(array) else array
          for path, array in parameters.items()}


def _to_float32(stored):
  return {path: array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
          for path, array in stored.items()}


def _to_int8(parameters):
  """Symmetric int8 with a float32 scale per output channel: kernels [..., in, out] over `in`,
  embeddings [rows, width] over `width`."""
  stored = {}
  for path, array in parameters.items():
    if not (_is_float(array) and array.ndim >= 2 and array.size >= _LEAST):
      stored[path] = array
      continue
    axis = -1 if path.rpartition('/')[2].startswith('embedding') else -2
    scale = np.abs(array).max(axis, keepdims=True).astype(np.float32) / 127
    stored[path] = np.rint(array / np.maximum(scale, 1e-30)).astype(np.int8)
    stored[path + _SCALE] = scale
  return stored


def _from_int8(stored):
  return {path: array.astype(jnp.float32) * stored[path + _SCALE]
          if path + _SCALE in stored else array
          for path, array in stored.items() if not path.endswith(_SCALE)}


PRECISIONS: dict[str, Precision] = {
    'float32': Precision('the parameters as trained', dict, dict, dtype='float32'),
    'bfloat16': Precision('half the size', _to_bfloat16, _to_float32),
    'int8': Precision('a quarter of the size: matrices as int8 with a scale per output',
                      _to_int8, _from_int8)}


def flat(variables) -> dict[str, np.ndarray]:
  """Arrays of a tree of variables by path, such as 'params/backbone/...'."""
  return {'/'.join(key.key for key in path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def nested(arrays: Mapping[str, Array]) -> dict:
  """The way back from `flat`."""
  tree: dict = {}
  for path, array in arrays.items():
    *folders, name = path.split('/')
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = array
  return tree
