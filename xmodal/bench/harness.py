"""Code the benchmarks share: threads and device, alternating timed rounds, command lines."""

import argparse
import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
import importlib.util
import os
import runpy
import time

from xmodal import config_files, errors
from xmodal.errors import UserError


def run_command(run: Callable[[argparse.Namespace], int | None],
                options: argparse.Namespace) -> int:
  """Runs a benchmark and returns its exit code; see errors.command."""
  return errors.command(lambda: run(options), '')


def check_positive(options: argparse.Namespace, *names: str) -> None:
  """Raises UserError if one of these options, or any value of a list option, is below 1."""
  for name in names:
    value = getattr(options, name)
    for number in value if isinstance(value, list) else [value]:
      if number is not None and number < 1:
        raise UserError(f'--{name.replace("_", "-")}={number}: wanted 1 or more')


def read_config(config: str):
  """Calls get_config() of a Python file or a named config; UserError if there is none."""
  try:
    return runpy.run_path(config_files.find(config))['get_config']()
  except (OSError, KeyError) as error:
    raise UserError(f'--config={config}: wanted a Python file with get_config(), such as those in '
                    'configs/') from error


def changed(config, changes: Iterable[str]):
  """Sets 'KEY=VALUE' or 'config.KEY=VALUE' each, and returns the config.

  Raises:
    UserError: one is no value of a key.
  """
  for change in changes:
    key, _, value = change.removeprefix('config.').partition('=')
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass  # a text
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise UserError(f'{change}: not a config value ({error}); xmodal keys lists all') from error
  return config


def chosen_ways(text: str, known: Sequence[str]) -> tuple[str, ...]:
  """Parses the comma-separated --ways; only 'ours' if torch is not installed."""
  names = tuple(text.split(','))
  if not set(names) <= set(known):
    raise UserError(f'--ways={text}: wanted some of {",".join(known)}')
  if not has_torch() and names != ('ours',):
    print('torch is not installed: measuring ours only')
    names = ('ours',)
  return names


def has_torch() -> bool:
  """Whether PyTorch is installed."""
  return importlib.util.find_spec('torch') is not None


def num_threads() -> int:
  """Number of processors that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def limit_threads(count: int | None) -> None:
  """Pins the process, and so XLA's and torch's thread pools, to `count` processors; None: all.

  Raises:
    UserError: there are fewer processors than that.
  """
  if count is None:
    return
  if not hasattr(os, 'sched_setaffinity'):
    raise UserError('--threads: this system cannot pin a process to processors; leave it out')
  present = sorted(os.sched_getaffinity(0))
  if not 1 <= count <= len(present):
    raise UserError(f'--threads={count}: wanted 1 to {len(present)}, the number of processors')
  os.sched_setaffinity(0, present[:count])


def share_gpu() -> None:
  """Makes JAX leave GPU memory to torch; call before JAX initialises its devices."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')


def torch_device() -> str:
  """Torch's name of JAX's only device; UserError if there are several or torch lacks it."""
  import jax
  import torch
  backend, count = jax.default_backend(), jax.device_count()
  if count > 1:
    raise UserError(f'PyTorch is measured on one device, found {count}: show one (such as '
                    'CUDA_VISIBLE_DEVICES=0), or measure only ours with --ways ours')
  if backend == 'cpu':
    return 'cpu'
  if backend != 'gpu' or not torch.cuda.is_available():
    raise UserError(f'JAX computes on a {backend}, which this PyTorch does not support: install '
                    'one that does, set JAX_PLATFORMS=cpu, or measure only ours with --ways ours')
  return 'cuda'


def measure(ways: Mapping[str, Callable], rounds: int, steps: int) -> dict[str, list[float]]:
  """Seconds per step of each way in each round; a round runs all ways in turn.

  A step returns arrays or tensors; each round ends by waiting for the last step's first one.
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
