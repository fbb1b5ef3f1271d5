"""Linear layers in integers of 8 or 4 bits, after or during training.

A kernel becomes integers times a scale: one for each output channel, and in 4 bits one for each 32
of its inputs (as in arXiv:2306.00978). Where activations are rounded too, each row of a layer's
inputs gets a scale as the layer runs, from its largest value, and the product is of integers
(arXiv:2206.01861). Norms, biases and position tables stay as they are.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
from typing import Any

import flax
from flax import linen as nn
from flax.core import meta
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_GROUP = 32  # inputs that share a scale in 4 bits


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How numbers are rounded.

  Attributes:
    bits: of a weight, 8 or 4.
    activations: whether inputs of linear layers are rounded too, to 8 bits.
  """

  bits: int
  activations: bool = False


ROUNDINGS = {
    'int8': Rounding(8, activations=True),
    'int8_weights': Rounding(8),
    'int4': Rounding(4),
}


class Quantized(flax.struct.PyTreeNode, meta.AxisMetadata):
  """A parameter in integers, which the layer that reads it gets as float32.

  Attributes:
    values: int8 [..., I, O]; in 4 bits uint8 [..., I / 2, O], two inputs each, the first in the low
      bits, offset by 8.
    scales: float32 [..., G, O], for G groups of inputs.
    rounding: see there.
    is_table: whether it is an embedding [V, D], stored as [D, V], so that each token has a scale.
  """

  values: jax.Array
  scales: jax.Array
  rounding: Rounding = flax.struct.field(pytree_node=False)
  is_table: bool = flax.struct.field(pytree_node=False, default=False)

  def integers(self) -> jax.Array:
    """int8 [..., I, O]."""
    if self.rounding.bits == 8:
      return self.values
    pairs = jnp.stack([self.values & 15, self.values >> 4], axis=-2)
    return pairs.reshape(*self.values.shape[:-2], -1, self.values.shape[-1]).astype(jnp.int8) - 8

  def unbox(self):
    found = _times(self.integers(), self.scales)
    return found.swapaxes(-1, -2) if self.is_table else found

  def replace_boxed(self, val):
    return val  # a new value is not rounded

  def add_axis(self, index, params):
    return self  # layers of a scan come first

  def remove_axis(self, index, params):
    return self


class Rounded(flax.struct.PyTreeNode, meta.AxisMetadata):
  """A parameter that a training step reads as `Quantized` would give it.

  Gradients pass as if it were not rounded (arXiv:1308.3432).
  """

  value: Any
  rounding: Rounding = flax.struct.field(pytree_node=False)
  is_table: bool = flax.struct.field(pytree_node=False, default=False)

  def unbox(self):
    value = meta.unbox(self.value)
    found = _quantized(jax.lax.stop_gradient(value), self.rounding, self.is_table).unbox()
    return value + jax.lax.stop_gradient(found - value)

  def replace_boxed(self, val):
    return self.replace(value=val)

  def add_axis(self, index, params):
    return self

  def remove_axis(self, index, params):
    return self


def quantize(params: Mapping, rounding: Rounding):
  """Parameters with `Quantized` kernels and embedding tables in place of float32 ones.

  Args:
    params: nested dicts of arrays; adapters (models.lora) stay as they are.
    rounding: see there.
  """
  return _mapped(params, lambda x, is_table: _quantized(x, rounding, is_table))


def rounded(params: Mapping, rounding: Rounding | None):
  """Parameters for a training step as `quantize` would round them; None: as they are."""
  if rounding is None:
    return params
  return _mapped(params, lambda x, is_table: Rounded(x, rounding, is_table))


def _mapped(params, make):
  found = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      found[name] = _mapped(value, make)
    elif name in ('kernel', 'embedding') and jax.tree.leaves(value)[0].ndim >= 2:
      found[name] = make(value, name == 'embedding')
    else:
      found[name] = value
  return found


def _quantized(x, rounding, is_table):
  x = x.swapaxes(-1, -2) if is_table else x
  inputs = x.shape[-2]
  if rounding.bits == 4 and inputs % 2:
    rounding = dataclasses.replace(rounding, bits=8)  # no pairs
  groups = inputs // _GROUP if rounding.bits == 4 and inputs % _GROUP == 0 else 1
  largest = 2 ** (rounding.bits - 1) - 1
  parts = x.reshape(*x.shape[:-2], groups, -1, x.shape[-1])
  scales = jnp.maximum(jnp.abs(parts).max(-2), jnp.finfo(jnp.float32).tiny) / largest
  values = jnp.round(parts / scales[..., None, :]).astype(jnp.int8).reshape(x.shape)
  if rounding.bits == 4:
    pairs = (values + 8).astype(jnp.uint8).reshape(*x.shape[:-2], -1, 2, x.shape[-1])
    values = pairs[..., 0, :] | pairs[..., 1, :] << 4
  return Quantized(values, scales, rounding, is_table)


def _times(values, scales):
  groups = values.reshape(*scales.shape[:-1], -1, scales.shape[-1])
  return (groups * scales[..., None, :]).reshape(values.shape)


def integer_products(params: Mapping):
  """A context in which linear layers with such parameters round their inputs, if they are to."""
  boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, (Quantized, Rounded)))
  if not any(isinstance(x, (Quantized, Rounded)) and x.rounding.activations for x in boxes):
    return contextlib.nullcontext()
  return nn.intercept_methods(_product)


def _product(layer_method, args, kwargs, context):
  layer = context.module
  if not isinstance(layer, nn.Dense) or context.method_name != '__call__':
    return layer_method(*args, **kwargs)
  kernel, x = layer.get_variable('params', 'kernel'), args[0]
  if not isinstance(kernel, (Quantized, Rounded)) or not kernel.rounding.activations:
    return layer_method(*args, **kwargs)
  if isinstance(kernel, Rounded):
    values, scales = _rows(jax.lax.stop_gradient(x))
    return layer_method(x + jax.lax.stop_gradient((values * scales).astype(x.dtype) - x))
  y = product(x, kernel)
  if layer.use_bias:
    y = y + layer.get_variable('params', 'bias')
  # A layer with a product of its own, such as one for logits, chooses the dtype of its output.
  return y if layer.dot_general is not None else y.astype(layer.dtype or x.dtype)


def product(x: Float[Array, '*B I'], kernel: Quantized) -> Float[Array, '*B O']:
  """float32 product of rounded inputs with a kernel in 8 bits."""
  values, scales = _rows(x.reshape(-1, x.shape[-1]))
  rows = len(values)
  if rows == 1:  # a CPU's kernels for integers want two
    values = jnp.concatenate([values, values])
  y = jax.lax.dot(values, kernel.values, preferred_element_type=jnp.int32)[:rows]
  return (y * (scales * kernel.scales)).reshape(*x.shape[:-1], -1)


def _rows(x):
  """Inputs as int8 and the scale of each row, float32 [..., 1]."""
  x = x.astype(jnp.float32)
  scales = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
  return jnp.round(x / scales).astype(jnp.int8), scales
