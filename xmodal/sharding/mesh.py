"""The device mesh, and batches sharded over it."""

from collections.abc import Callable, Sequence
import functools
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from xmodal import target
from xmodal.errors import UserError
from xmodal.options import Option

AXES = ('data', 'fsdp', 'tensor')
# A batch is split over both axes: fsdp shards examples as well as parameters.
BATCH_AXES = ('data', 'fsdp')

OPTIONS = {
    'data': Option(-1, 'Devices over which a batch is split; -1: all devices left by the others.',
                   low=-1, may_change=True),
    'fsdp': Option(1, 'Devices over which batch and parameters are split.', low=1,
                   may_change=True),
    'tensor': Option(1, 'Devices over which each layer is split.', low=1, may_change=True)}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """A mesh over all devices of all hosts.

  Args:
    data: number of model replicas; -1 for as many as the devices allow.
    fsdp: number of shards of each parameter, gathered where used (arXiv:1910.02054, stage 3).
    tensor: number of shards of each layer's width (arXiv:1909.08053).

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = target.devices()
  count = len(devices)
  if data == -1 and fsdp > 0 and tensor > 0 and count % (fsdp * tensor) == 0:
    data = count // (fsdp * tensor)
  if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != count:
    raise UserError(f'config.mesh: data={data}, fsdp={fsdp}, tensor={tensor} do not multiply to '
                    f'the {count} devices; config.mesh.data=-1 takes the remaining devices')
  return Mesh(arrange(devices, (data, fsdp, tensor)), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """Arranges devices [D] in a mesh of a shape of D, so that the last axes have the fastest links.

  Slices (of TPUs, or GPUs of one NVLink domain, usually a host) are connected by a slower network.
  The first axes span them, the last ones only where the first are too short. jax.make_mesh refuses
  several slices, and on most TPUs refuses shapes that split an axis of the torus.
  """
  slices: dict[int, int] = {}
  for device in devices:
    index = getattr(device, 'slice_index', 0)
    slices[index] = slices.get(index, 0) + 1
  if len(set(slices.values())) > 1:  # such as 8 GPUs of one host and 4 of another
    return np.array(devices).reshape(shape)
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  across, left = [], len(slices)
  for size in shape:
    across.append(math.gcd(size, left))
    left //= across[-1]
  within = [size // ways for size, ways in zip(shape, across, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, across, devices,
                                              allow_split_physical_axes=True)


def batch_ways(mesh: Mesh) -> int:
  """How many parts the devices split a batch into."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def check_batch(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
  """Raises UserError if a batch does not divide into micro-batches, devices and hosts."""
  if batch_size < 1 or accumulation < 1:
    raise UserError(f'config.train.batch_size={batch_size}, '
                    f'config.train.accumulation={accumulation}: wanted 1 or more of each')
  ways = batch_ways(mesh)
  if batch_size % (ways * accumulation):
    raise UserError(f'config.train.batch_size={batch_size} does not divide into {accumulation} '
                    f'micro-batches over {ways} devices (mesh data x fsdp); take a multiple of '
                    f'{ways * accumulation}')


def over(mesh: Mesh, function: Callable) -> Callable:
  """Wraps a function so that it is traced with a mesh, on which the model lays out activations
  (see models.layout)."""
  @functools.wraps(function)
  def traced(*args, **options):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **options)

  return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays [B, ...] by examples."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding with a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that this host's devices hold, in ascending order: int64 [N].

  Hosts may share rows: if a model replica spans several hosts, they all hold the
  same rows.
  """
  slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows, in slices.values()]))


def put_batch(batch, mesh: Mesh, batch_size: int):
  """This host's rows of a batch (numpy [N, ...], see local_rows) as arrays over the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(
      sharding, x, (batch_size, *x.shape[1:])), batch)


def get_batch(batch):
  """This host's rows of a batch over the mesh as numpy arrays, in the order of local_rows."""
  def shards(x):
    if isinstance(x, np.ndarray):
      return (x,)
    by_start = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return tuple(by_start[start] for start in sorted(by_start))

  leaves, structure = jax.tree.flatten(batch)
  parts = jax.device_get([shards(x) for x in leaves])
  return structure.unflatten(map(np.concatenate, parts))
