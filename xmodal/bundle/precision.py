"""How a bundle stores parameters, by the name of a precision: one entry of PRECISIONS each.

An entry turns the model's parameters into the arrays of a file, and, inside the program, those
arrays back into parameters. XLA compiles the latter into the program, so that a device holds the
small arrays alone.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped
import ml_dtypes
import numpy as np

from xmodal.models.quantized import ROUNDINGS, Quantized, Rounding, quantize

Stored = Mapping[str, np.ndarray]
_VALUES, _SCALES = '#values', '#scales'  # end the names of the two arrays of a parameter


@dataclasses.dataclass(frozen=True)
class Precision:
  """One way to store parameters.

  Attributes:
    help: one sentence for --help.
    store: (parameters by path, 'params/backbone/...', numpy arrays) -> arrays to store by name.
      Every name begins with the path of its parameter; what follows a '#' tells apart several
      arrays of one parameter.
    restore: the way back, on the device: (arrays by name) -> parameters by path, float32 or
      models.quantized.Quantized where they were float32.
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


def _integers(rounding: Rounding):
  """The two functions of a Precision for weights in integers, see models.quantized."""
  def store(parameters):
    stored = {}
    for path, array in flat_boxes(quantize(nested(parameters), rounding)).items():
      stored |= {f'{path}{_VALUES}': np.asarray(array.values),
                 f'{path}{_SCALES}': np.asarray(array.scales)} if isinstance(
                     array, Quantized) else {path: np.asarray(array)}
    return stored

  def restore(stored):
    restored = {}
    for name, array in stored.items():
      path = name.partition('#')[0]
      if name.endswith(_VALUES):
        restored[path] = Quantized(
            array, stored[f'{path}{_SCALES}'],
            dataclasses.replace(rounding, bits=4 if array.dtype == jnp.uint8 else 8),
            path.endswith('/embedding'))
      elif not name.endswith(_SCALES):
        restored[path] = array
    return restored

  return store, restore


PRECISIONS: dict[str, Precision] = {
    'float32': Precision('the parameters as trained', dict, dict, dtype='float32'),
    'bfloat16': Precision('half the size', _to_bfloat16, _to_float32),
    'int8': Precision('about a quarter of the size: weights and inputs of linear layers in 8 bits',
                      *_integers(ROUNDINGS['int8'])),
    'int8_weights': Precision('about a quarter of the size: weights in 8 bits',
                              *_integers(ROUNDINGS['int8_weights'])),
    'int4': Precision('about a sixth of the size: weights in 4 bits',
                      *_integers(ROUNDINGS['int4']))}


def flat(variables) -> dict[str, np.ndarray]:
  """Arrays of a tree of variables by path, such as 'params/backbone/...'."""
  return {'/'.join(key.key for key in path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def flat_boxes(tree, path: str = '') -> dict[str, Any]:
  """Leaves of nested dicts by path; a Quantized is a leaf."""
  if not isinstance(tree, Mapping):
    return {path: tree}
  return {name: leaf for key, value in tree.items()
          for name, leaf in flat_boxes(value, f'{path}/{key}' if path else key).items()}


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
