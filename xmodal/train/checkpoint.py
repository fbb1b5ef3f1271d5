"""Checkpoints that are found whole or not at all, and carry all that `predict` needs.

checkpoints/STEP/ holds three items: `model` (parameters, running statistics,
moving average), `training` (optimiser state, weights of tasks, step, random key:
with the seed, the step is the position in the data), and `assets` (config.json,
tokenizer/, a folder a task). Orbax writes to a temporary folder and renames it.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import sys

from absl import logging as absl_logging
from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from xmodal.errors import UserError
from xmodal.sharding.rules import path_name
from xmodal.train.state import TrainState

ASSETS = 'assets'


class _FolderHandler(ocp.CheckpointHandler):
  """Copies a folder of small files into the checkpoint."""

  def save(self, directory, args):
    shutil.copytree(args.source, directory, dirs_exist_ok=True)

  def restore(self, directory, args=None):
    return str(directory)


@ocp.args.register_with_handler(_FolderHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Folder(ocp.args.CheckpointArgs):
  source: str = ''


@jax.jit
def _fingerprint(tree):
  """One uint32 that changes with any bit of a tree of 4-byte arrays.

  Orbax's checksums cover its index but not the arrays themselves, so a byte
  that rotted on disk would come back as a wrong parameter.
  """
  total = jnp.zeros((), jnp.uint32)
  for number, leaf in enumerate(jax.tree.leaves(tree)):
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
      place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # Odd weights: no changed word can vanish modulo 2^32.
    total += (bits * (2 * place + 1)).sum(dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
  return total


def _split(state: TrainState):
  model = {'params': state.params, 'collections': state.collections}
  if state.ema is not None:
    model['ema'] = state.ema
  training = {'opt_state': state.opt_state, 'mixer': state.mixer, 'step': state.step,
              'rng': state.rng, 'skipped': state.skipped,
              'skipped_in_a_row': state.skipped_in_a_row}
  return model, training


class Checkpoints:
  """Saves and restores the state of one run."""

  def __init__(self, workdir: str, keep: int):
    """Checkpoints in workdir/checkpoints, the newest `keep` of them."""
    _quieten()
    self._workdir = os.path.abspath(workdir)
    self._folder = os.path.join(self._workdir, 'checkpoints')
    self._keep = keep
    self._manager = self._open()

  def _open(self):
    return ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep, enable_async_checkpointing=True))

  def save(self, state: TrainState, assets: str) -> None:
    """Writes a checkpoint in the background; the state may be changed once this returns.

    Raises:
      UserError: this one or the one before could not be written.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    items = {name: ocp.args.StandardSave({'arrays': tree, 'fingerprint': _fingerprint(tree)})
             for name, tree in zip(('model', 'training'), _split(state))}
    with self._disk_errors():
      self._manager.save(step, args=ocp.args.Composite(**items, assets=_Folder(assets)))

  def wait(self) -> None:
    """Returns when what was saved lies on disk; raises UserError if it could not be written."""
    with self._disk_errors():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _disk_errors(self):
    try:
      yield
    except Exception as error:
      text = str(error)
      full = any(sign in text
                 for sign in ('No space left', 'RESOURCE_EXHAUSTED', 'ENOSPC', 'quota'))
      if not full and not isinstance(error, OSError):
        raise
      what = 'no space left on the device' if full else text.splitlines()[0]
      raise UserError(
          f'checkpoint in {self._folder} could not be written ({what}); the newest whole one is of '
          f'step {self._manager.latest_step() or 0}: make room and run the same command to go on '
          'from there') from error

  def restore(self, abstract: TrainState, warn) -> TrainState | None:
    """The newest checkpoint that is whole, on the devices that `abstract` says; None if none is.

    A damaged one is moved to workdir/damaged and told to `warn(line)`.

    Raises:
      UserError: the checkpoint is of another model, or may not be read, or all are damaged.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      folder = os.path.join(self._folder, str(step))
      try:
        model, training = (_read(folder, name, tree)
                           for name, tree in zip(('model', 'training'), _split(abstract)))
      except _Damaged as damage:
        warn(f'checkpoint {folder} is damaged ({damage}): moved to {self._workdir}/damaged, trying '
             'the one before')
        self._set_aside(folder, step)
        continue
      return TrainState(params=model['params'], collections=model['collections'],
                        ema=model.get('ema'), **training)
    if steps:
      # Starting over would write over what there is to learn from the old run.
      raise UserError(f'no checkpoint in {self._workdir} can be read: all are in {self._workdir}/'
                      'damaged; to start over, delete the workdir or give another --workdir')
    return None

  def _set_aside(self, folder, step):
    if jax.process_index() == 0:
      target = os.path.join(self._workdir, 'damaged', str(step))
      shutil.rmtree(target, ignore_errors=True)
      os.makedirs(os.path.dirname(target), exist_ok=True)
      os.rename(folder, target)
    self._manager.close()
    self._manager = self._open()

  def close(self) -> None:
    """Waits for what is being written, and lets go of the folder."""
    self.wait()
    self._manager.close()


class _Damaged(Exception):
  """A checkpoint cannot be read as it was written."""


# The fault of the moment, not of the file.
_NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)


def _read(folder, item, abstract):
  """One item of a checkpoint; raises _Damaged, or UserError if it is of another model."""
  path = epath.Path(folder, item)
  fingerprint = jax.ShapeDtypeStruct((), jnp.uint32, sharding=_any_sharding(abstract))
  wanted = {'arrays': abstract, 'fingerprint': fingerprint}
  # Orbax's reader threads print tracebacks of their own when a file is broken.
  hook, sys.excepthook = sys.excepthook, lambda *_: None
  try:
    handler = ocp.StandardCheckpointHandler()
    _check_same_model(handler.metadata(path), wanted, folder)
    with ocp.Checkpointer(handler) as reader:
      read = reader.restore(path, args=ocp.args.StandardRestore(wanted))
  except UserError:
    raise
  except Exception as error:
    error = _wrapped(error)
    if not isinstance(error, (OSError, ValueError, KeyError)):
      raise
    if getattr(error, 'errno', None) in _NOT_DAMAGE:
      raise UserError(f'checkpoint {folder} cannot be read ({error.strerror}); put that right and '
                      'run the same command again') from error
    raise _Damaged(f'{item}: {str(error).splitlines()[0][:120]}') from error
  finally:
    sys.excepthook = hook
  if int(_fingerprint(read['arrays'])) != int(read['fingerprint']):
    raise _Damaged(f'{item}: an array has changed since it was written')
  return read['arrays']


def _wrapped(error):
  """What Orbax, of an array it could not read, wraps in an exception of no narrower type."""
  while type(error) is Exception and error.__cause__ is not None:
    error = error.__cause__
  return error


def _any_sharding(abstract):
  sharding = jax.tree.leaves(abstract)[0].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


def _check_same_model(metadata, wanted, folder):
  def shapes(tree):
    return {path_name(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}

  stored, needed = shapes(getattr(metadata, 'item_metadata', metadata)), shapes(wanted)
  for name in sorted(stored.keys() | needed.keys()):
    if stored.get(name) != needed.get(name):
      raise UserError(
          f'checkpoint {folder} is of another model: {name} is {stored.get(name, "missing")} there '
          f'and {needed.get(name, "missing")} here; take the config it was trained with, or '
          'another --workdir')


def find(folder: str) -> str:
  """The step folder meant by a step folder or a workdir: of a workdir, the newest.

  Raises:
    UserError: there is no checkpoint.
  """
  folder = os.path.abspath(folder)
  if os.path.isdir(os.path.join(folder, 'model')):  # a workdir holds assets too, but no model
    return folder
  if not (numbers := saved_steps(folder)):
    raise UserError(f'no checkpoint in {folder}; wanted a workdir of xmodal.main or one of its '
                    'checkpoints/STEP folders')
  return os.path.join(folder, 'checkpoints', str(max(numbers)))


def saved_steps(workdir: str) -> list[int]:
  """The steps of which there are checkpoints, whole or damaged."""
  folder = os.path.join(workdir, 'checkpoints')
  names = os.listdir(folder) if os.path.isdir(folder) else ()
  return [int(name) for name in names if name.isdigit()]


def load_variables(folder: str, abstract_variables, ema: bool):
  """The variables to apply the model with, from one step folder.

  Args:
    folder: checkpoints/STEP.
    abstract_variables: shapes and shardings, as model.init gives them.
    ema: whether the run kept a moving average; it is what gets applied then.

  Raises:
    UserError: it is damaged, or of another model.
  """
  collections = dict(abstract_variables)
  params = collections.pop('params')
  wanted = {'params': params, 'collections': collections} | ({'ema': params} if ema else {})
  try:
    model = _read(folder, 'model', wanted)
  except _Damaged as damage:
    raise UserError(f'checkpoint {folder} is damaged ({damage}); take an earlier one') from damage
  return {'params': model['ema' if ema else 'params'], **model['collections']}


def _quieten():
  """Keeps what Orbax has to say besides errors raised off the terminal."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger('orbax').setLevel(logging.CRITICAL)
  # A full disk fails many writes at once; one line says so, not a traceback each.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _without_echoes


def _without_echoes(unraisable):
  # Once one write has failed Orbax ends its event loop; each array still under way then prints a
  # traceback of that, up to the end of the process.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)
