"""Makes one run of several processes, started by hand, MPI, Slurm, Kubernetes or on a TPU pod."""

from collections.abc import Mapping
from importlib.metadata import version
import os
import re
from typing import NamedTuple

import jax

import xmodal
from xmodal.errors import UserError
from xmodal.sharding import hosts, roll_call

# Variables in which launchers say the number of processes and that of this one.
_COUNTS = ('JAX_NUM_PROCESSES', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')
_NUMBERS = ('JAX_PROCESS_ID', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')


class ProcessPlace(NamedTuple):
  """A process of a run.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: number of processes.
    number: of this process, from 0.
    local: number of this process on its machine; None: unknown.
  """

  coordinator: str
  count: int
  number: int
  local: int | None = None


def join(coordinator: str, count: int | None, number: int | None, facts: Mapping[str, str],
         wait: int, lost: int) -> None:
  """Joins the processes; has to come before any use of a device.

  Args:
    coordinator: HOST:PORT of process 0; '': as the cluster says.
    count: number of processes; None: as the launcher says.
    number: of this process, likewise.
    facts: what the processes must agree on, beside versions.
    wait: seconds to wait for the others.
    lost: seconds without a sign of life after which a process counts as dead.

  Raises:
    UserError: the others are not found, or do not belong to this run.
  """
  place = _by_hand(coordinator, count, number) or _of_cluster(wait)
  versions = {f'the version of {name}': version(name) for name in _PACKAGES}
  roll_call.meet(place.coordinator, place.count, place.number, {
      'the version of xmodal': xmodal.__version__, **versions, **facts}, wait)
  # JAX would take SIGTERM for itself.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      place.coordinator, place.count, place.number, local_devices(place.local, dict(os.environ)),
      cluster_detection_method='deactivate', initialization_timeout=wait,
      heartbeat_timeout_seconds=max(100, 2 * lost))  # then JAX aborts, which xmodal does before
  if hosts.several():
    hosts.Listener.lost = lost
    hosts.listener()
    if place.number != 0:
      hosts.end_with_first(roll_call.parse(place.coordinator))


def _by_hand(coordinator, count, number):
  """The ProcessPlace that flags and variables give; None without a coordinator."""
  if not (address := coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')):
    if (count, number) != (None, None):
      raise UserError('--num_processes and --process_id need --coordinator, HOST:PORT of process 0')
    return None
  roll_call.parse(address)
  count = _given(count, _COUNTS, '--num_processes')
  number = _given(number, _NUMBERS, '--process_id')
  if count < 1 or not 0 <= number < count:
    raise UserError(f'--process_id={number}, --num_processes={count}: wanted numbers from 0 to one '
                    'less than their number')
  local = os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK') or os.environ.get('MPI_LOCALRANKID')
  return ProcessPlace(address, count, number, int(local) if local else None)


def _given(value, variables, flag):
  for variable in variables if value is None else ():
    if (text := os.environ.get(variable, '')):
      if not text.isdecimal():
        raise UserError(f'{variable}={text}: wanted a whole number')
      return int(text)
  if value is None:
    raise UserError(f'a run with a coordinator needs {flag}, too, or one of the variables '
                    f'{", ".join(variables)}')
  return value


def _of_cluster(wait):
  """The ProcessPlace in the cluster that JAX recognises."""
  from jax._src.clusters import ClusterEnv  # JAX has no public name for it
  try:
    address, count, number, local = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, wait)
  except (RuntimeError, ValueError, OSError, KeyError) as error:
    raise _not_found(' '.join(str(error).split())) from error
  if None in (address, count, number):
    raise _not_found('no cluster is recognised')
  return ProcessPlace(address, count, number, local[0] if local else None)


def _not_found(reason):
  return UserError(f'--multihost: the other processes cannot be found ({reason}); start it under '
                   'Slurm, MPI, Kubernetes or on a TPU pod, give --coordinator, --num_processes '
                   'and --process_id, or leave --multihost out')


def local_devices(local: int | None, environment: Mapping[str, str]) -> list[int] | None:
  """The GPUs of this process among those it sees; None: all.

  A process alone on its machine has all, several share them equally, and one that sees a single
  GPU has it: a launcher may show each process its own.

  Args:
    local: number of this process on its machine; None: unknown.
    environment: variables of the process.

  Raises:
    UserError: the GPUs do not divide among the processes.
  """
  if ids := environment.get('JAX_LOCAL_DEVICE_IDS'):
    if not re.fullmatch(r'\d+(,\d+)*', ids):
      raise UserError(f'JAX_LOCAL_DEVICE_IDS={ids}: wanted numbers with commas between them')
    return [int(number) for number in ids.split(',')]
  visible, processes = _visible(environment), _local_count(environment)
  if local is None or visible <= 1 or processes == 1:
    return None
  if visible % processes:
    raise UserError(f'{visible} GPUs do not divide among {processes} processes on this machine; '
                    'start one process a GPU, or one a machine, or set JAX_LOCAL_DEVICE_IDS')
  share = visible // processes
  return list(range(local * share, (local + 1) * share))


def _visible(environment):
  """The number of GPUs that this process sees."""
  if (shown := environment.get('CUDA_VISIBLE_DEVICES')) is not None:
    return len([name for name in shown.split(',') if name.strip() and name != '-1'])
  try:
    return sum(bool(re.fullmatch(r'nvidia\d+', name)) for name in os.listdir('/dev'))
  except OSError:
    return 0


def _local_count(environment):
  """The number of processes on this machine, as launchers say it; 1 if none says it."""
  for name in ('OMPI_COMM_WORLD_LOCAL_SIZE', 'MPI_LOCALNRANKS'):
    if environment.get(name, '').isdecimal():
      return int(environment[name])
  # Slurm's '4(x2),3': four on each of two machines, then three.
  counts = []
  for part in environment.get('SLURM_STEP_TASKS_PER_NODE', '').split(','):
    if found := re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part):
      counts += [int(found[1])] * int(found[2] or 1)
  node = environment.get('SLURM_NODEID', '')
  return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1
