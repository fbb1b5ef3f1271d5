"""Where activations lie on a mesh of devices, for those parts of a model that XLA would not place well.

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


def whole(x: jax.Array) -> jax.Array:
  """The same array, all of it on every device."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec()) if _axes()[0] else x
