"""Sharding constraints for activations that XLA would place badly.

They apply to the mesh for which the program is traced (see sharding.mesh.over). Without a mesh, as
on one device, they do nothing.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

# The axes of sharding.mesh that split a batch.
_ROW_AXES = ('data', 'fsdp')


def _axes():
  """The mesh axes that split rows, and the number of devices along them."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in _ROW_AXES if axis in mesh.axis_names)
  return axes, math.prod(mesh.shape[axis] for axis in axes)


def split_rows(x: Shaped[Array, 'N ...']) -> Shaped[Array, 'M ...']:
  """Splits rows [N, ...] over the devices: [M, ...], the first N rows of which are x.

  M is the next multiple of the number of devices. The other rows are copies of the first one,
  because a row of zeros may have no gradient.
  """
  axes, count = _axes()
  if not axes:
    return x
  if missing := -len(x) % count:
    x = jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def keep_rows(x: Shaped[Array, '*dims']) -> Shaped[Array, '*dims']:
  """Keeps activations [B, ...] split by rows between layers.

  If parameters are split over `fsdp`, XLA would otherwise gather the activations of all rows, and
  each device would compute a part of their width with its part of the parameters.
  """
  axes, count = _axes()
  if jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) == 1 or x.shape[0] % count:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def on_each_device(function: Callable, *x: Shaped[Array, 'B ...']) -> Shaped[Array, 'B ...']:
  """function(*x) of rows [B, ...] that do not depend on each other, computed by the device that has
  them.

  Otherwise XLA synchronises all devices at each turn of a loop that ends when all rows are ready.
  """
  axes, count = _axes()
  if count == 1 or len(x[0]) % count:
    return function(*x)
  return jax.shard_map(function, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(axes),
                       check_vma=False)(*x)


def whole(x: Shaped[Array, '*dims']) -> Shaped[Array, '*dims']:
  """Replicates an array on every device."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _axes()[0] else x
