"""Devices of machines that are not attached, for XLA's compilers to compile for."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import pathlib
import re
from unittest import mock

import jax
from jax.experimental import topologies

from xmodal import target
from xmodal.cost.machines import MACHINES
from xmodal.errors import UserError, did_you_mean

_WANTED = ('wanted MACHINE:SHAPE, such as v5e:4x4 (chips along each axis), h100:8 (GPUs of one '
           'host) or h100:4x8 (hosts x GPUs of each)')
_GPUS = ('h100', 'h200')
_TPUS = {'v4': 3, 'v5e': 2, 'v5p': 3, 'v6e': 2}


def split(name: str) -> tuple[str, tuple[int, ...]]:
  """Splits 'v5e:4x4' into ('v5e', (4, 4)).

  Raises:
    UserError: the name is malformed, or its machine cannot be compiled for.
  """
  machine, _, shape = name.partition(':')
  known = (*_GPUS, *_TPUS)
  if machine not in known:
    raise UserError(f'--topology={name}: no machine {machine!r}{did_you_mean(machine, known)}; '
                    f'known are {", ".join(known)}')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    raise UserError(f'--topology={name}: {_WANTED}')
  sizes = tuple(map(int, shape.split('x')))
  if machine in _GPUS and len(sizes) > 2 or machine in _TPUS and len(sizes) != _TPUS[machine]:
    raise UserError(f'--topology={name}: {_WANTED}')
  return machine, sizes


def devices_of(name: str, slices: int = 1) -> Sequence[jax.Device]:
  """The devices of a topology.

  Args:
    name: 'MACHINE:SHAPE', see split.
    slices: TPU slices of this shape that a network connects.

  Raises:
    UserError: the topology does not exist, or its compiler is not installed.
  """
  machine, sizes = split(name)
  if machine in _GPUS:
    hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
    if slices != 1:
      raise UserError(f'--slices={slices}: GPUs have none; wanted --topology={machine}:HOSTSx8')
    return _topology(name, 'cuda', 'jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc, with '
                     '--no-deps', topology=f'1x{hosts}x{gpus}', target_config=_gpu(machine)).devices
  # Without these, libtpu looks for a TPU of this machine, and lets one process use it.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  more = {'chip_config_name': 'megacore'} if machine == 'v4' else {}
  return _topology(name, 'tpu', 'libtpu, as jax[tpu] wants it',
                   topology_name=f'{machine}:{"x".join(map(str, sizes))}',
                   **({'num_slices': slices} if slices != 1 else {}), **more).devices


def _topology(name, platform, packages, topology_name='', **options):
  try:
    return topologies.get_topology_desc(platform=platform, topology_name=topology_name, **options)
  except Exception as error:
    text = ' '.join(str(error).split())
    if re.search('not installed|plugin|[Uu]nknown backend|not implemented', text):
      raise UserError(f'--topology={name}: the compiler of {platform} is not installed '
                      f'({text[:150]}); pip install {packages}') from error
    raise UserError(f'--topology={name}: does not exist ({text[:200]})') from error


def _gpu(machine):
  text = (pathlib.Path(__file__).parent / 'h100.txtpb').read_text(encoding='utf-8')
  if machine == 'h100':
    return text
  # The same chip with another memory.
  found = MACHINES[machine]
  text = re.sub(r'memory_bandwidth: \d+', f'memory_bandwidth: {found.bandwidth:.0f}', text)
  text = re.sub(r'device_memory_size: \d+', f'device_memory_size: {found.memory:.0f}', text)
  return text.replace('H100 80GB HBM3', machine.upper())


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
  """target.compiling_for, in which also JAX's checks of a GPU for cuDNN see the target."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(target.compiling_for(devices))
    if devices[0].platform == 'gpu':
      from jax._src.cudnn import fused_attention_stablehlo as cudnn
      # They ask for the version and the compute capability of a real GPU.
      for check, answer in (('check_cudnn_version', 91000), ('check_compute_capability', True),
                            ('is_cuda_compute_capability_equal', False)):
        stack.enter_context(mock.patch.object(cudnn, check, lambda *_, answer=answer: answer))
    yield
