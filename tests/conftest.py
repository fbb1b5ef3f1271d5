"""Shared by all tests: quiet libraries, a cache of compiled programs, one finished run."""

import gc
from importlib.metadata import version
import os
import pathlib
import zlib

# Tolerances are those of a CPU; tests that want a GPU: JAX_PLATFORMS=cuda, test_gpu.py and
# test_towers.py -k cudnn.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

if 'PYTEST_XDIST_WORKER' not in os.environ:  # workers inherit the environment of this process
  # Compiled programs are kept for the next tests, on a processor with the same instructions.
  cpu = pathlib.Path('/proc/cpuinfo')
  instructions = {line for line in (cpu.read_text() if cpu.exists() else '').splitlines()
                  if line.startswith(('flags', 'Features'))}
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
      pathlib.Path(__file__).parents[1] / '.pytest_cache'
      / f'programs-{zlib.crc32(repr(sorted(instructions)).encode()):08x}')
  # A cache of limited size locks its files, so no process reads a half-written one.
  os.environ['JAX_COMPILATION_CACHE_MAX_SIZE'] = str(3 * 2**30)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
  # Eight devices on two busy cores may wait for each other longer than XLA's 40 seconds.
  flags = [os.environ.get('XLA_FLAGS', ''),
           '--xla_cpu_collective_call_terminate_timeout_seconds=600']
  if os.environ['JAX_PLATFORMS'] == 'cpu':
    # Test programs run for milliseconds; without optimisation they compile in a third of the time.
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    flags.append('--xla_cpu_parallel_codegen_split_count=1')  # other tests have the other cores
    # XLA aborts at unknown flags, such as this one from 0.11.1 on.
    if tuple(map(int, version('jaxlib').split('.')[:3])) < (0, 11, 1):
      flags.append('--xla_cpu_use_fusion_emitters=false')
  os.environ['XLA_FLAGS'] = ' '.join(flags)
# See main.give_threads: with one thread for each of two cores, eight devices deadlocked in 7 of 40
# runs; with 64 threads in none.
os.environ['NPROC'] = '64'

import pytest
import shape_checks

shape_checks.install()  # before any test imports a model

# Looking for cycles among the millions of objects of traced programs took 8% of the time.
gc.set_threshold(100_000, 20, 50)


# The slowest files. A worker takes a whole file, so one that starts last would keep a single worker
# busy after the others have finished.
LONGEST = ('test_eight_devices.py', 'test_commands.py', 'test_names.py', 'test_sharding.py',
           'test_multihost.py', 'test_remote_runs.py', 'test_finetuning.py', 'test_optimised.py',
           'test_mixer_runs.py', 'test_checkpoints.py', 'test_generation_task.py',
           'test_bench_multitask.py', 'test_notebook.py', 'test_pretrained_runs.py',
           'test_detection_runs.py', 'test_plugins.py', 'test_start.py', 'test_best.py',
           'test_workers.py', 'test_remote_data.py', 'test_serve_model.py', 'test_bundle.py',
           'test_prune.py', 'test_serve_page.py', 'test_teacher.py')
# It alone imports TensorFlow, after which a first import of Triton (by torch, for transformers)
# ends the process.
LAST = 'test_source_tfds.py'


@pytest.hookimpl(optionalhook=True)  # unknown where xdist is off
def pytest_xdist_auto_num_workers():
  # One more than processors: a fifth of the time a worker waits, for another process or a timeout.
  return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())


def pytest_collection_modifyitems(items):
  ranks = {name: rank for rank, name in enumerate(LONGEST)} | {LAST: 999}
  items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope='session')
def finished_tiny(tmp_path_factory):
  """A workdir of the tiny run, with checkpoints of steps 3 and 6; copy it before changing it."""
  import tiny
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  tiny.train(workdir)
  return workdir


@pytest.fixture(scope='session')
def finished(finished_tiny):
  """The same; a file of tests may put finished_single in its place."""
  return finished_tiny


@pytest.fixture(scope='session')
def finished_single(tmp_path_factory):
  """As finished_tiny, of the one task of single.py."""
  import single
  workdir = tmp_path_factory.mktemp('finished_single') / 'run'
  single.train(workdir)
  return workdir
