"""Gathers parameters sharded over `fsdp` where a layer uses them, and only there."""

import functools

import flax
from flax.core import meta
import jax
from jax.sharding import PartitionSpec

from xmodal.sharding.rules import path_name, spec_for


def gather_when_used(params):
  """Wraps parameters so that the module that reads one gathers it over `fsdp`.

  This is ZeRO's third stage (arXiv:1910.02054): a device holds its shard of a layer until the layer
  runs, and gradients are reduced into shards again. By default, XLA gathers the activations of the
  whole batch instead; and with more than one device along each of `data`, `fsdp` and `tensor` its
  partitioner (jaxlib 0.10.2 and 0.12.0) computes wrong gradients where a product with a parameter
  sharded over `fsdp` meets a slice of an array: see tests/test_sharding.py.

  Args:
    params: nested dicts of arrays, in a function traced for a mesh (see sharding.mesh.over).

  Returns:
    Variables for Module.apply. Without a mesh, or with a single device along `fsdp`: `params`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get('fsdp', 1) == 1:
    return params
  return jax.tree_util.tree_map_with_path(
      lambda path, x: _Share(x, spec_for(path_name(path), x.shape, mesh)), params)


class _Share(flax.struct.PyTreeNode, meta.AxisMetadata):
  """A parameter [..., *dims] with the PartitionSpec of all dimensions, including scanned ones."""

  value: jax.Array
  spec: PartitionSpec = flax.struct.field(pytree_node=False)

  def unbox(self):
    return _gather(self.value, PartitionSpec(*self.spec[len(self.spec) - self.value.ndim:]))

  def replace_boxed(self, val):
    return self.replace(value=val)

  def add_axis(self, index, params):
    return self  # stacked dimensions come first and are never split

  def remove_axis(self, index, params):
    return self


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x, spec):
  return jax.lax.with_sharding_constraint(x, _without_fsdp(spec))


def _backward(spec, _, gradient):
  # Reduced in the layout in which the parameter was used, then sharded; otherwise XLA would shard
  # activations like the parameter.
  gradient = jax.lax.with_sharding_constraint(gradient, _without_fsdp(spec))
  return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(lambda x, spec: (_gather(x, spec), None), _backward)


def _without_fsdp(spec):
  def rest(axes):
    if isinstance(axes, tuple):
      return tuple(axis for axis in axes if axis != 'fsdp')
    return None if axes == 'fsdp' else axes

  return PartitionSpec(*map(rest, spec))
