"""Trains, evaluates, or checks a run: xmodal train --config vqa, or python -m xmodal.main.

Exit codes, so that `main && predict` or a scheduler knows how it ended:
  0    finished
  75   stopped by SIGTERM or Ctrl-C, and saved, or another process of the run died: run the same
       command again (EX_TEMPFAIL)
  130  ended by Ctrl-C with nothing to save, or by a second Ctrl-C; 143 likewise by SIGTERM
  2    something for you to mend: one line says what
  1    a defect of the program, with a traceback
"""

import contextlib
import os
import re
import signal
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from xmodal import config_files, errors, heap, paths
from xmodal.errors import UserError
from xmodal.registry import import_plugins
from xmodal.sharding import hosts
from xmodal.train.process import stop

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'File with get_config(), or the name of one in configs/, here or in this '
    'package. --config.KEY=VALUE changes one of its values.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run, also in a bucket (gs://BUCKET/FOLDER); '
    'runs/NAME_OF_CONFIG if none. A run found there goes on.')
_MULTIHOST = flags.DEFINE_bool(
    'multihost', False, 'One of several processes of one run, each with this same command: on a '
    'TPU pod, under Slurm, MPI or Kubernetes. --coordinator implies it.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0, for processes that are started by hand; or '
    'JAX_COORDINATOR_ADDRESS.')
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Number of processes; or JAX_NUM_PROCESSES, or as MPI says.')
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0; or JAX_PROCESS_ID, or as MPI says.')
_WAIT = flags.DEFINE_integer(
    'wait', 50, 'Seconds to wait for the other processes.', lower_bound=1)
_LOST = flags.DEFINE_integer(
    'lost', 25, 'Seconds without a sign of life after which a process counts as dead.',
    lower_bound=5)
_MODE = flags.DEFINE_enum(
    'mode', 'train', ['train', 'eval', 'dry_run', 'compile', 'plan'],
    'train; eval: score the newest checkpoint; dry_run: check everything and train nothing; '
    'compile: compile the step for --topology and print what it costs; plan: suggest a mesh for 1 '
    'to 4,096 devices of --topology.')
_TOPOLOGY = flags.DEFINE_string(
    'topology', '', 'Machine of compile and plan, such as v5e:4x4, h100:8 or h100:4x8 (hosts x '
    'GPUs); for plan without its shape.')
_SLICES = flags.DEFINE_integer(
    'slices', 1, 'For compile: TPU slices of that topology.', lower_bound=1)
_FLAGS = [flags.FLAGS[name] for name in ('config', 'workdir', 'mode', 'multihost', 'coordinator',
                                         'num_processes', 'process_id', 'wait', 'lost', 'topology',
                                         'slices')]


def main() -> int:
  """Runs a command line; returns its exit code, see the top of this file.

  Of several processes, what ends one ends all, with the same line and code.
  """
  errors.prepare_environment()
  workdir = ''
  try:
    if {'-h', '--help'} & set(sys.argv[1:]):
      print(_help(sys.argv))
      return 0
    config, workdir = _parse(sys.argv)
    return _run(config, workdir, _MODE.value)
  except KeyboardInterrupt:  # a second Ctrl-C, or one before or after training
    hosts.end_all('ended by Ctrl-C', 130)
    return 130
  except SystemExit as error:
    hosts.end_all('ended by SIGTERM', error.code)
    raise
  except Exception as error:
    if hosts.several() and errors.peer_is_gone(error):
      reason = str(error).splitlines()[0][:200]
      hosts.end_all(f'another process died ({reason}); run the same command again to resume',
                    hosts.EXIT_CODE)
    if line := ' '.join(errors.one_line(error, workdir).splitlines()):
      hosts.end_all(f'error: {line}', 2)
      return errors.fail(line)
    hosts.end_all(f'error: one of the processes ended with {type(error).__name__}, its output says '
                  'more', 1, traceback.format_exc())
    raise


def _help(argv=()):
  from xmodal import config as configs
  import_plugins(argv)
  return '\n'.join([__doc__, '', *(f'  --{flag.name}: {flag.help}' for flag in _FLAGS), '',
                    '--config.KEY=VALUE changes a key; all keys with their defaults:', '',
                    configs.table()])


def _parse(argv):
  from xmodal import config as configs
  import_plugins(argv)
  argv = _with_config_file(argv)
  try:
    rest = flags.FLAGS(argv)
    config = _CONFIG.value
    # A file that could not be read raises when its config is touched, not before.
    usable = config is None or hasattr(config, 'seed')
  except OSError as error:
    raise UserError(f'--config: {str(error).splitlines()[-1].strip()}; wanted a Python file with '
                    'get_config(), such as configs/vqa.py') from error
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    text = error.args[0] if error.args else error
    while isinstance(text, BaseException):  # a KeyError around another: str() would quote it twice
      text = text.args[0] if text.args else type(text).__name__
    text = ' '.join(str(text).split())
    if 'before a value for --config' in text:
      raise UserError('--config FILE has to come before the keys that change it') from error
    text = text.replace("' Did you", "'; did you")
    for argument in argv:
      keys = argument.removeprefix('--').partition('=')[0].split('.')
      if any(text.startswith(repr(key)) for key in keys):
        text = f'{argument}: no key {text}'
        break
    raise UserError(f'{text}; --help lists all keys') from error
  if len(rest) > 1:
    raise UserError(f'arguments not understood: {" ".join(rest[1:])}; flags look like --key=value')
  if config is None:
    raise UserError('no --config; try --config vqa')
  file = flags.FLAGS['config'].config_filename
  if not usable:
    raise UserError(f'--config {file}: get_config() returned a {type(config).__name__}; wanted '
                    'what xmodal.config.base() returns, with changes')
  configs.check_given(config, [argument.removeprefix('--config.').partition('=')[0]
                               for argument in argv if argument.startswith('--config.')])
  name = os.path.splitext(os.path.basename(file))[0]
  return config, paths.resolved(_WORKDIR.value or os.path.join('runs', name), '--workdir')


def _with_config_file(argv):
  """The arguments with a file in place of each config's name."""
  argv = list(argv)
  for at, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals:
      argv[at] = f'{flag}={_find(value)}'
    elif at + 1 < len(argv):
      argv[at + 1] = _find(argv[at + 1])
  return argv


def _find(config):
  # What follows a colon is an argument of get_config().
  name, *argument = config.split(':', 1)
  return ':'.join([config_files.find(name), *argument])


def _run(config, workdir, mode):
  if mode in ('compile', 'plan'):
    return {'compile': _compile, 'plan': _suggest}[mode](config)
  if _TOPOLOGY.value:
    raise UserError(f'--topology={_TOPOLOGY.value} goes with xmodal compile and xmodal plan')
  import jax

  from xmodal.train import run
  from xmodal.train.plan import Plan
  from xmodal.train.process.compilation_cache import enable_compilation_cache

  if _MULTIHOST.value or _COORDINATOR.value or (_NUM_PROCESSES.value, _PROCESS_ID.value) != (
      None, None):
    _join_hosts(config, workdir, mode)
  else:
    use_two_cores(config)
  give_threads(split=(config.mesh.fsdp, config.mesh.tensor) != (1, 1))
  enable_compilation_cache()
  plan = Plan(config, workdir, mode)
  if mode == 'dry_run':
    from xmodal.train.describe import describe
    print(describe(plan))
    return 0
  if mode == 'eval':
    scores = run.evaluate_newest(plan)
  elif final := run.train(plan):
    scores = final['evaluation']
  else:
    return stop.EXIT_CODE
  if scores and jax.process_index() == 0:
    samples, board = (text if os.path.isdir(f'{plan.workdir}/{name}') else '' for name, text in (
        ('samples', 'samples/ (pictures to look at), '), ('tensorboard', ', tensorboard/')))
    print(f'\n{plan.evaluation.table(scores)}\n\nin {plan.folder.address}: {samples}metrics.jsonl, '
          f'final.json, checkpoints/{board}')
  return 0


def _compile(config):
  from xmodal import compile as compiling
  if not _TOPOLOGY.value:
    raise UserError('xmodal compile wants --topology, such as v5e:4x4 or h100:8')
  for found in compiling.compile_for(config, _TOPOLOGY.value, _SLICES.value):
    print(compiling.report(_TOPOLOGY.value, found), flush=True)
    compiling.check_fits(_TOPOLOGY.value, found)
  return 0


def _suggest(config):
  from xmodal import suggest
  machine = _TOPOLOGY.value
  if not machine:
    raise UserError('xmodal plan wants --topology, such as v5e or h100')
  print(suggest.report(config, machine))
  return 0


def use_two_cores(config) -> None:
  """On a CPU, halves of a batch go to two devices: one alone leaves a second core idle in small
  models (two took 143 ms for a step of configs/detection.py, one 170)."""
  import jax
  chosen = jax.config.jax_num_cpu_devices > 0 or 'device_count' in os.environ.get('XLA_FLAGS', '')
  is_split = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) != (-1, 1, 1)
  if _cores() > 1 and not chosen and not is_split and (
      config.train.batch_size % (2 * max(config.train.accumulation, 1)) == 0) and (
          config.train.eval_batch_size % 2 == 0):
    with contextlib.suppress(RuntimeError):  # another part of the program uses JAX already
      jax.config.update('jax_num_cpu_devices', 2)


def give_threads(split: bool = False) -> None:
  """Gives XLA a thread for each device of a CPU, before the first use of a device.

  XLA computes parts of a program in a pool with a thread a core (or as many as NPROC says), and a
  device that waits for the others in a collective keeps one of them. With fewer threads than
  devices, the last device may get none, and all wait for ever. A device that gathers parameters may
  keep two: two devices on two threads hung. If parameters are not split, more threads than cores
  cost a third of the speed (501 examples/s of configs/vqa.py on two threads, 322 on four).

  split: whether parameters are split over the devices (config.mesh.fsdp or tensor).
  """
  import jax
  forced = re.search(r'xla_force_host_platform_device_count=(\d+)', os.environ.get('XLA_FLAGS', ''))
  devices = max(jax.config.jax_num_cpu_devices, int(forced[1]) if forced else 1)
  wanted = 2 * devices if split and devices > 1 else devices
  threads = os.environ.get('NPROC', '')
  if wanted > (int(threads) if threads.isdecimal() else _cores()):
    os.environ['NPROC'] = str(wanted)


def _cores():
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _join_hosts(config, workdir, mode):
  """Makes one run of all processes; has to come before any use of a device."""
  from xmodal.train.process.join import join
  join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
       {**_flat(config, 'config'), '--workdir': workdir, '--mode': mode}, _WAIT.value,
       _LOST.value)
  if hosts.several():
    # Until training saves: this process would be gone, and the others wait for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _flat(config, name):
  """{'config.train.steps': '100', ...}"""
  if not hasattr(config, 'items'):
    return {name: repr(config)}
  return {key: value for part, values in config.items()
          for key, value in _flat(values, f'{name}.{part}').items()}


if __name__ == '__main__':
  heap.keep_memory()
  sys.exit(main())
