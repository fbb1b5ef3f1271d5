"""What benchmarks share: processors and device of both sides, rounds in turn, and command lines."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import importlib.util
import os
import runpy
import time

from xmodal import config_files, errors
from xmodal.errors import UserError


def run_command(run: Callable[[argparse.Namespace], int | None],
                options: argparse.Namespace) -> int:
  """Runs a benchmark; its exit code: see errors.command."""
  return errors.command(lambda: run(options), '')


def check_positive(options: argparse.Namespace, *names: str) -> None:
  """Raises UserError where one of these options, or one of several values of it, is below 1."""
  for name in names:
    value = getattr(options, name)
    for number in value if isinstance(value, list) else [value]:
      if number is not None and number < 1:
        raise UserError(f'--{name.replace("_", "-")}={number}: wanted 1 or more')


def read_config(config: str):
  """What get_config() of a Python file or of a named config returns; UserError if there is none."""
  try:
    return runpy.run_path(config_files.find(config))['get_config']()
  except (OSError, KeyError) as error:
    raise UserError(f'--config={config}: wanted a Python file with get_config(), such as those in '
                    'configs/') from error


def chosen_ways(text: str, known: Sequence[str]) -> tuple[str, ...]:
  """Some of the ways there are, given with commas; ours alone where torch is not installed."""
  names = tuple(text.split(','))
  if not set(names) <= set(known):
    raise UserError(f'--ways={text}: wanted some of {",".join(known)}')
  if importlib.util.find_spec('torch') is None and names != ('ours',):
    print('torch is not installed: measuring ours alone')
    names = ('ours',)
  return names


def num_threads() -> int:
  """Processors that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def limit_threads(count: int | None) -> None:
  """Holds the process, and so XLA's and torch's thread pools, to `count` processors; None: to all.

  Raises:
    UserError: there are not so many.
  """
  if count is None:
    return
  if not hasattr(os, 'sched_setaffinity'):
    raise UserError('--threads: this system cannot hold a process to some processors; leave it out')
  present = sorted(os.sched_getaffinity(0))
  if not 1 <= count <= len(present):
    raise UserError(f'--threads={count}: wanted 1 to {len(present)}, the processors there are')
  os.sched_setaffinity(0, present[:count])


def share_gpu() -> None:
  """Lets JAX leave memory of a GPU to torch; to be called before JAX looks at its devices."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')


def torch_device() -> str:
  """Torch's name of the one device that JAX computes on; UserError where both cannot."""
  import jax
  import torch
  backend, count = jax.default_backend(), jax.device_count()
  if count > 1:
    raise UserError(f'PyTorch is measured on one device, found {count}: show one (such as '
                    'CUDA_VISIBLE_DEVICES=0), or measure ours alone with --ways ours')
  if backend == 'cpu':
    return 'cpu'
  if backend != 'gpu' or not torch.cuda.is_available():
    raise UserError(f'JAX computes on a {backend}, which this PyTorch cannot: install one that '
                    'can, take JAX_PLATFORMS=cpu, or measure ours alone with --ways ours')
  return 'cuda'


def measure(ways: Mapping[str, Callable], rounds: int, steps: int) -> dict[str, list[float]]:
  """Seconds a step of each way in each round; a round runs them all, in turn.

  A step returns arrays or tensors, the first of which is waited for at the end of its round.
  """
  seconds = {name: [] for name in ways}
  for _ in range(rounds):
    for name, step in ways.items():
      began = time.perf_counter()
      for _ in range(steps):
        result, *_ = step()
      result.tolist()  # waits for the device
      seconds[name].append((time.perf_counter() - began) / steps)
  return seconds
