"""Programs of a bundle in the formats of other runtimes: ONNX and TensorFlow's SavedModel.

Inputs and outputs have the names, shapes and dtypes that bundle.json states. A converted program is
run for each batch size of _BATCHES, and counts only if it gives the numbers of JAX.
"""

from collections.abc import Callable, Mapping
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
from unittest import mock
import warnings

import jax
from jax.extend.core import jaxpr_as_fun
import numpy as np

from xmodal.bundle.programs import without_paths
from xmodal.errors import UserError

_BATCH = 1  # of an ONNX file
_BATCHES = {'onnx': (_BATCH,), 'saved_model': (1, 3)}  # that are compared
_STABLEHLO = '1.13.0'  # TensorFlow 2.21 has 1.13.7
# Largest difference, for outputs above 1 relative to the largest value. Rounding of a detector with
# random parameters differs by 1.4e-4 between TensorFlow 2.21 and JAX 0.12, by 8e-5 between JAX 0.10
# and 0.12.
_TOLERANCE = 3e-4
_NEEDED = {'onnx': ('jax2onnx', 'onnxruntime'), 'saved_model': ('tensorflow',)}


def check(formats) -> None:
  """Raises UserError for a format that is unknown, or whose packages are not installed."""
  for name in formats:
    if name not in CONVERTERS:
      raise UserError(f'--format {name}: wanted {" or ".join(CONVERTERS)}')
    for package in _NEEDED[name]:
      if importlib.util.find_spec(package) is None:
        raise UserError(f'--format {name} needs {package}: pip install "xmodal[{name}]"')


def convert(name: str, run: Callable, weights: Mapping[str, np.ndarray],
            inputs: Mapping[str, tuple], most: Mapping[str, int], path: str) -> tuple[str, str]:
  """Writes one task's program: of batch 1 in ONNX, of any batch in a SavedModel.

  Returns the file or folder that was written, and '' or, in one line, why it cannot be converted.

  Args:
    name: of a format, from CONVERTERS.
    run: (weights by name, inputs by name) -> outputs by name.
    weights: parameters by name.
    inputs: (dims, dtype) of each input; dims are numbers or letters.
    most: values of the letters for the programs that have to know them, besides the batch.
    path: a file or folder to write, without its ending.
  """
  try:
    with _quietly(), without_paths():
      written, again = CONVERTERS[name](run, weights, inputs, most, path)
      for batch in _BATCHES[name]:
        example = _example(inputs, {'b': batch, **most})
        _compare(jax.device_get(jax.jit(run)(weights, example)), again(example))
  except Exception as error:  # converters raise exceptions of every type
    for left in (path, f'{path}.onnx', f'{path}.onnx.data'):
      shutil.rmtree(left, ignore_errors=True)
      with contextlib.suppress(OSError):
        os.unlink(left)
    return '', ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
  return written, ''


def _compare(wanted, found):
  for key, array in wanted.items():
    if array.dtype.kind in 'iub':
      alike = np.mean(array == found[key]) > 0.99
    else:
      # A side of a box is a difference of numbers as large as the others: so is its rounding.
      most = _TOLERANCE * np.abs(array[np.isfinite(array)]).max(initial=1)
      alike = np.allclose(array, found[key], rtol=0, atol=most)
    if array.shape != found[key].shape or not alike:
      raise ValueError(f'its output {key} differs from that of JAX')


def _example(inputs, letters):
  """Random inputs of a size."""
  rng = np.random.default_rng(0)
  made = {}
  for name, (dims, dtype) in inputs.items():
    shape = tuple(letters.get(dim, dim) for dim in dims)
    if dtype == 'bool':
      made[name] = np.ones(shape, bool)
    else:
      high = 256 if dtype == 'uint8' else 3
      made[name] = rng.integers(1, high, shape).astype(dtype)
  if 'extent' in made:
    made['extent'][:] = made['image'].shape[1:3]
  return made


@contextlib.contextmanager
def _quietly():
  """Converters print much that says nothing about the result."""
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(logging.NOTSET)


def _to_onnx(run, weights, inputs, most, path):
  """An ONNX file with the parameters inside."""
  import jax2onnx
  import onnxruntime
  names = list(inputs)
  letters = {**most, 'b': _BATCH}
  specs = [jax.ShapeDtypeStruct(tuple(letters.get(dim, dim) for dim in dims), dtype)
           for dims, dtype in inputs.values()]
  # Traced by JAX: jax2onnx replaces functions of jax.numpy while it traces, with other rules.
  with mock.patch.multiple(jax.numpy, einsum=_einsum, where=_where):
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(weights, dict(zip(names, specs)))
  arrays = [jax.numpy.asarray(weights[name]) for name in sorted(weights)]
  order, outputs = sorted(names), sorted(shapes)

  def flat(*values):
    given = dict(zip(names, values))
    return tuple(jaxpr_as_fun(closed)(*arrays, *(given[name] for name in order)))

  file = f'{path}.onnx'
  # Names in a graph are unique; a picture may go in and come out.
  named = [f'{name}_out' if name in names else name for name in outputs]
  jax2onnx.to_onnx(flat, specs, input_names=names, output_names=named, return_mode='file',
                   output_path=file)
  quiet = onnxruntime.SessionOptions()
  quiet.log_severity_level = 3
  session = onnxruntime.InferenceSession(file, quiet, providers=['CPUExecutionProvider'])
  return file, lambda example: dict(zip(outputs, session.run(named, example)))


def _to_saved_model(run, weights, inputs, most, path):
  """A SavedModel with one signature, whose program is StableHLO in TensorFlow's XlaCallModule."""
  from jax.experimental import jax2tf
  import tensorflow as tf
  names = sorted(weights)
  letters = {letter for dims, _ in inputs.values() for letter in dims if isinstance(letter, str)}
  dims = {name: ', '.join(map(str, dims)) for name, (dims, _) in inputs.items()}
  least = [f'{letter} >= {min(8, most.get(letter, 1))}' for letter in letters]
  shapes = [None, {name: f'({text})' for name, text in dims.items()}]
  converted = jax2tf.convert(
      _for_tensorflow(run), polymorphic_shapes=shapes, polymorphic_constraints=least,
      with_gradient=False, native_serialization_platforms=['cpu', 'cuda', 'tpu'])
  module = tf.Module()
  module.weights = [tf.Variable(weights[name], trainable=False) for name in names]
  signature = [tf.TensorSpec([dim if isinstance(dim, int) else None for dim in shape], dtype, name)
               for name, (shape, dtype) in inputs.items()]

  @tf.function(autograph=False, input_signature=signature)
  def answer(*values):
    with _stablehlo_for_tensorflow():
      return converted(dict(zip(names, module.weights)), dict(zip(inputs, values)))

  module.answer = answer
  tf.saved_model.save(module, path, signatures={'serving_default': answer.get_concrete_function()})
  loaded = tf.saved_model.load(path).signatures['serving_default']
  return path, lambda example: {
      name: value.numpy() for name, value in loaded(
          **{name: tf.constant(value) for name, value in example.items()}).items()}


@contextlib.contextmanager
def _stablehlo_for_tensorflow():
  """Writes StableHLO that TensorFlow 2.21 reads: JAX writes what consumers of last month read."""
  from jax._src.export import _export  # JAX has no public setting
  with contextlib.ExitStack() as stack:
    if version := getattr(_export.hlo, 'get_version_from_compatibility_requirement', None):
      stack.enter_context(mock.patch.object(
          _export.hlo, 'get_version_from_compatibility_requirement',
          lambda wanted: _export.hlo.get_smaller_version(version(wanted), _STABLEHLO)))
    yield


def _where(condition, x=None, y=None, *, where=jax.numpy.where, **options):
  """jnp.where, that of truth values as 'and' and 'or': ONNX Runtime has no other."""
  if x is None or not all(
      jax.numpy.issubdtype(jax.numpy.result_type(one), jax.numpy.bool_) for one in (x, y)):
    return where(condition, x, y, **options)
  return (condition & x) | (~condition & y)


def _einsum(equation, *arrays, einsum=jax.numpy.einsum, **options):
  """jnp.einsum, that of three arrays as products and a sum, which ONNX Runtime accepts."""
  if len(arrays) < 3:
    return einsum(equation, *arrays, **options)
  inputs, output = equation.replace(' ', '').split('->')
  letters = output + ''.join(sorted(set(inputs) - set(output) - {','}))
  product = 1
  for names, array in zip(inputs.split(','), arrays):
    array = array.transpose([names.index(one) for one in letters if one in names])
    product *= array.reshape([array.shape[sorted(names, key=letters.index).index(one)]
                              if one in names else 1 for one in letters])
  return product.sum(tuple(range(len(output), len(letters))))


def _for_tensorflow(run):
  """A function without jax.lax.top_k and jnp.cumsum, whose operations TensorFlow 2.21 does not
  read: a sort and sums in a tree take their place."""
  def top_k(x, k):
    order = jax.numpy.argsort(x, axis=-1, descending=True, stable=True)[..., :k]
    return jax.numpy.take_along_axis(x, order, axis=-1), order.astype('int32')

  def cumsum(x, axis=None, dtype=None):
    x = jax.numpy.asarray(x, dtype)
    x, axis = (x.ravel(), 0) if axis is None else (x, axis)
    return jax.lax.associative_scan(jax.numpy.add, x, axis=axis)

  def plain(*arguments):
    with mock.patch.object(jax.lax, 'top_k', top_k), mock.patch.object(jax.numpy, 'cumsum', cumsum):
      return run(*arguments)

  return plain


CONVERTERS = {'onnx': _to_onnx, 'saved_model': _to_saved_model}
