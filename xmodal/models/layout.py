"""Where activations lie on a mesh of devices, where XLA would not place them well.

The mesh is the one that the program is traced for (see sharding.mesh.over). Without one, as in a
program of one device, nothing here does anything.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# The axes of sharding.mesh over which a batch is split.
_ROW_AXES = ('data', 'fsdp')


def _axes():
  """Those of the mesh over which rows are split, and how many devices they have."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in _ROW_AXES if axis in mesh.axis_names)
  return axes, math.prod(mesh.shape[axis] for axis in axes)


def split_rows(x: jax.Array) -> jax.Array:
  """Rows [N, ...] split over the devices: [N', ...], of which the first N are x.

  N' is the next multiple of the number of devices; the rest are copies of the first row, because
  a row of zeros may have no gradient.
  """
  axes, count = _axes()
  if not axes:
    return x
  if missing := -len(x) % count:
    x = jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)])
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def keep_rows(x: jax.Array) -> jax.Array:
  """Activations [B, ...] between layers, where they are: split by rows.

  Where parameters are split over `fsdp`, XLA would rather gather the activations of all rows and
  compute a part of their width with the part of the parameters that a device has.
  """
  axes, count = _axes()
  if jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) == 1 or x.shape[0] % count:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def whole(x: jax.Array) -> jax.Array:
  """The same array, all of it on every device."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _axes()[0] else x
