"""Parameters split over `fsdp` are gathered where a layer uses them, and only there."""

import functools

import flax
from flax.core import meta
import jax
from jax.sharding import PartitionSpec

from xmodal.sharding.rules import path_name, spec_for


def gather_when_used(params):
  """The same parameters, each to be gathered over `fsdp` by the module that reads it.

  This is ZeRO's third stage (arXiv:1910.02054): a device holds its share of a layer until the layer
  runs, and gradients are summed into shares again. Left to choose, XLA gathers the activations of
  the whole batch instead; and with more than one device along each of `data`, `fsdp` and `tensor`
  its partitioner (jaxlib 0.10.2 and 0.12.0) gets gradients wrong where a product with a parameter
  split over `fsdp` meets a part of an array: see tests/test_sharding.py.

  Args:
    params: nested dicts of arrays, in a function traced for a mesh (see sharding.mesh.over).

  Returns:
    Variables for Module.apply. Without a mesh, or without devices along `fsdp`: `params`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get('fsdp', 1) == 1:
    return params
  return jax.tree_util.tree_map_with_path(
      lambda path, x: _Share(x, spec_for(path_name(path), x.shape, mesh)), params)


class _Share(flax.struct.PyTreeNode, meta.AxisMetadata):
  """A parameter [..., *dims] with the specification of all dimensions before a scan took some."""

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
  # Summed as the parameter was used and then split; else activations would be split like it.
  gradient = jax.lax.with_sharding_constraint(gradient, _without_fsdp(spec))
  return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(lambda x, spec: (_gather(x, spec), None), _backward)


def _without_fsdp(spec):
  def rest(axes):
    if isinstance(axes, tuple):
      return tuple(axis for axis in axes if axis != 'fsdp')
    return None if axes == 'fsdp' else axes

  return PartitionSpec(*map(rest, spec))
