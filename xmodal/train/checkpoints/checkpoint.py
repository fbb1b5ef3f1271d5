"""Checkpoints: written atomically, with everything that prediction needs.

checkpoints/STEP/ holds three items: `model` (parameters, running statistics, moving average),
`training` (optimizer state, task weights, step, random key; seed and step determine the position in
the data), and `assets` (config.json, tokenizer/, a folder for each task). Each has files.json, a
list of its files with their checksums. Orbax writes to a temporary folder and renames it.

In gs:// Orbax writes to the final folder, and a last file makes it complete. It cannot write to
other buckets: those get a copy of what it wrote on this machine. See checkpoints.bucket.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys

from absl import logging as absl_logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from xmodal import downloads, paths, storage
from xmodal.errors import UserError, disk_failure, disk_is_full, fixable_reason
from xmodal.options import Option
from xmodal.train.checkpoints import alias, bucket, damage, reading
from xmodal.train.process import together
from xmodal.train.steps.state import TrainState

ASSETS = 'assets'
DAMAGED = 'damaged'
BEST = 'best.json'  # see train.hooks.best
ORBAX_WRITES = ('', 'gs')  # kinds of addresses; '' is this machine
# TensorStore's errors of Google's storage, such as "PERMISSION_DENIED: ...".
_GOOGLE = re.compile(r'[A-Z_]{5,}: .{0,200}')

OPTIONS = {
    'checkpoint_every': Option(500, 'Steps between checkpoints.', low=1, may_change=True),
    'keep_checkpoints': Option(2, 'Number of newest checkpoints to keep.', low=1, may_change=True)}


class _FolderHandler(ocp.CheckpointHandler):
  """Copies a folder of small files into the checkpoint."""

  def save(self, directory, args):
    if jax.process_index() != 0:
      return
    if storage.is_remote(directory):
      storage.copy_all(storage.upload, ((os.path.join(args.source, name), f'{directory}/{name}')
                                        for name in damage.names(args.source)))
    else:
      shutil.copytree(args.source, directory, dirs_exist_ok=True)

  def restore(self, directory, args=None):
    return str(directory)

  def finalize(self, directory):
    damage.seal(str(directory))


@ocp.args.register_with_handler(_FolderHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Folder(ocp.args.CheckpointArgs):
  source: str = ''


class _ArraysHandler(ocp.PyTreeCheckpointHandler):
  """Orbax's handler, which also writes a list of its files."""

  def __init__(self):
    # Orbax lets each device with a copy of an array write a slice of it. Slicing many small arrays
    # on 8 devices stops the training four times as long as copying them from one device. Of large
    # arrays, each process should write its part.
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=max(1, 2**20 // jax.process_count()))
    super().__init__(type_handler_registry=ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())))

  def finalize(self, directory):
    super().finalize(directory)
    damage.seal(str(directory))


@ocp.args.register_with_handler(_ArraysHandler, for_save=True)
class _Arrays(ocp.args.PyTreeSave):
  """Arguments for saving with that handler."""


@ocp.args.register_with_handler(_ArraysHandler, for_restore=True)
class _ArraysBack(ocp.args.PyTreeRestore):
  """Arguments for restoring, which Orbax requires for each handler."""


def _split(state: TrainState):
  model = {'params': state.params, 'collections': state.collections}
  if state.ema is not None:
    model['ema'] = state.ema
  training = {'opt_state': state.opt_state, 'mixer': state.mixer, 'step': state.step,
              'rng': state.rng, 'skipped': state.skipped,
              'skipped_in_a_row': state.skipped_in_a_row}
  return model, training


@dataclasses.dataclass
class _KeepBest(preservation_policy.PreservationPolicy):
  """Keeps the checkpoint of one step."""

  best: Callable[[], int | None]

  def should_preserve(self, checkpoints, *, context):
    del context
    return [checkpoint.step == self.best() for checkpoint in checkpoints]


class Checkpoints:
  """Saves and restores the state of one run; every process of the run makes the same calls."""

  def __init__(self, workdir: str, keep: int, best: Callable[[], int | None] = lambda: None,
               local: str = ''):
    """Manages workdir/checkpoints; keeps the newest `keep` and the one of step `best()`.

    Args:
      workdir: on this machine or in a bucket.
      keep, best: see above.
      local: for a workdir in a bucket other than gs://, a folder of this machine in its place.
    """
    _quieten()
    self._workdir = workdir if storage.is_remote(workdir) else os.path.abspath(workdir)
    self._folder = os.path.join(self._workdir, 'checkpoints')
    self._copies = None
    if storage.scheme(workdir) not in ORBAX_WRITES:
      own = os.path.join(local, 'checkpoints')
      self._copies = bucket.Copies(own, self._folder, keep, best)
      self._copying = concurrent.futures.Future()
      self._copying.set_result(None)
    self._policy = preservation_policy.AnyPreservationPolicy(
        [preservation_policy.LatestN(keep), _KeepBest(best)])
    self._closing = contextlib.ExitStack()
    if self._copies:
      self._copier = self._closing.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    self._usable = os.path.join(self._closing.enter_context(
        alias.SafePath(local if self._copies else self._workdir)), 'checkpoints')
    with storage.explained(self._folder):
      self._manager = self._open()

  def _open(self):
    return ocp.CheckpointManager(self._usable, options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy, enable_async_checkpointing=True))

  def save(self, state: TrainState, assets: str) -> None:
    """Writes a checkpoint in the background; the state may be changed once this returns.

    Raises:
      UserError: this checkpoint or the previous one could not be written.
    """
    step = int(state.step)
    if self._copies:
      self.wait()
    if step in self._manager.all_steps():
      return
    items = {name: _Arrays({'arrays': tree, 'fingerprint': reading.fingerprint(tree)})
             for name, tree in zip(('model', 'training'), _split(state))}
    with self._disk_errors():
      self._manager.save(step, args=ocp.args.Composite(**items, assets=_Folder(assets)))
    if self._copies:
      self._copying = self._copier.submit(self._copy)

  def _copy(self):
    self._manager.wait_until_finished()
    self._copies.send()

  def wait(self) -> None:
    """Waits until all checkpoints are on disk; raises UserError if one could not be written."""
    with self._disk_errors():
      if self._copies:
        self._copying.result()
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _disk_errors(self):
    try:
      with storage.explained(self._folder):
        yield
    except Exception as error:
      if disk_is_full(error):
        what, way_out = 'no space left on the device', 'make room'
      elif storage.is_remote(self._folder) and (found := _GOOGLE.match(str(error))):
        what, way_out = found[0], 'fix that'
      elif what := disk_failure(error) or (
          fixable_reason(error) if isinstance(error, OSError) else ''):
        way_out = 'fix that'
      else:
        raise
      raise UserError(
          f'checkpoint in {self._folder} could not be written ({what}); the last complete one is '
          f'step {self._manager.latest_step() or 0}: {way_out} and run the same command to resume '
          'from it') from error

  def restore(self, abstract: TrainState, warn) -> TrainState | None:
    """Reads the newest undamaged checkpoint, with the shardings of `abstract`; None if none.

    A damaged checkpoint is moved to workdir/damaged, in a bucket marked as damaged, and reported
    with `warn(line)`.

    Raises:
      UserError: the checkpoint is from another model or cannot be read now, or all are damaged.
    """
    check_not_all_damaged(self._workdir)
    steps = together.agree(lambda: ' '.join(map(str, sorted(self._steps()))), lead=True)
    for step in map(int, reversed(steps.split())):
      folder = os.path.join(self._folder, str(step))
      try:
        read = reading.read(self._readable(step), dict(zip(('model', 'training'),
                                                           _split(abstract))))
      except reading.Damaged as proof:
        reason = str(proof)
        target = together.agree(lambda: self._set_aside(folder, step, reason), lead=True)
        warn(f'checkpoint {folder} is damaged ({proof}): {target}, trying an earlier one')
        self._reopen()
        continue
      if self._copies:
        self._reopen()
      model, training = read['model'], read['training']
      return TrainState(params=model['params'], collections=model['collections'],
                        ema=model.get('ema'), **training)
    check_not_all_damaged(self._workdir)
    return None

  def _steps(self):
    return saved_steps(self._workdir) if self._copies else self._manager.all_steps()

  def _readable(self, step):
    """The folder to read a checkpoint from."""
    return (self._copies.fetch(step) if self._copies else
            os.path.join(self._folder, str(step)))

  def _reopen(self):
    self._manager.close()
    self._manager = self._open()

  def _set_aside(self, folder, step, proof):
    if storage.is_remote(folder):
      bucket.set_aside(folder, proof)
      if self._copies:
        self._copies.drop(step)
      return f'marked by {bucket.DAMAGED}'
    target, number = os.path.join(self._workdir, DAMAGED, str(step)), 1
    while os.path.lexists(target):  # an earlier checkpoint of this step was damaged, too
      number += 1
      target = os.path.join(self._workdir, DAMAGED, f'{step}-{number}')
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(folder, target)
    return f'moved to {target}'

  def close(self) -> None:
    """Waits for unfinished writes and releases the folder."""
    with self._closing:
      self.wait()
      self._manager.close()


def check_not_all_damaged(workdir: str) -> None:
  """Raises UserError if all checkpoints of a run are damaged.

  Starting over would overwrite the rest of the run, so the user decides.
  """
  if storage.is_remote(workdir):
    folder = os.path.join(workdir, 'checkpoints')
    if bucket.steps(folder, bucket.DAMAGED) and not bucket.steps(folder):
      raise UserError(f'no checkpoint in {workdir} can be read: all have {bucket.DAMAGED}; to '
                      'start over, delete the workdir or give another --workdir')
    return
  folder = os.path.join(workdir, DAMAGED)
  if os.path.isdir(folder) and os.listdir(folder) and not saved_steps(workdir):
    raise UserError(f'no checkpoint in {workdir} can be read: all are in {folder}; to start over, '
                    'delete the workdir or give another --workdir; to try one again, move it back '
                    f'to {workdir}/checkpoints')


def find(folder: str) -> str:
  """Resolves a step folder, a workdir (newest step) or WORKDIR/best to a step folder.

  Raises:
    UserError: there is no checkpoint.
  """
  folder = paths.resolved(folder, 'checkpoint folder')
  if storage.is_dir(os.path.join(folder, 'model')):  # a workdir holds assets too, but no model
    return folder
  workdir, name = os.path.split(folder)
  if name == 'best' and storage.is_file(os.path.join(workdir, BEST)):
    return _find_best(workdir)
  if not (numbers := saved_steps(folder)):
    check_not_all_damaged(folder)
    if storage.is_remote(folder):
      storage.check_bucket(folder)
    raise UserError(f'no checkpoint in {folder}; wanted a workdir of xmodal train or one of its '
                    'checkpoints/STEP folders')
  return os.path.join(folder, 'checkpoints', str(max(numbers)))


def local_copy(folder: str, items: Collection[str] = ('model', ASSETS)) -> str:
  """A step folder of this machine: itself, or a copy of one in a bucket with some items."""
  if not storage.is_remote(folder):
    return folder
  return downloads.copy(folder, lambda name: name.partition('/')[0] in items)


def whole(folder: str) -> str:
  """A step folder for Orbax: itself in gs://, where each process reads its shards, or a copy."""
  return folder if storage.scheme(folder) in ORBAX_WRITES else local_copy(folder)


def _find_best(workdir):
  path = os.path.join(workdir, BEST)
  try:
    with storage.open_file(path) as f:
      step = json.load(f)['step']
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged; use one of {workdir}/checkpoints') from error
  if step not in saved_steps(workdir):
    raise UserError(f'{path} names step {step}, but {workdir} has no checkpoint of that step; '
                    f'use one of {workdir}/checkpoints')
  return os.path.join(workdir, 'checkpoints', str(step))


def saved_steps(workdir: str) -> list[int]:
  """The steps of all checkpoints, damaged or not."""
  folder = os.path.join(workdir, 'checkpoints')
  if storage.is_remote(workdir):
    return bucket.steps(folder)
  names = os.listdir(folder) if os.path.isdir(folder) else ()
  return [int(name) for name in names if name.isdigit()]


def load_variables(folder: str, abstract_variables, ema: bool):
  """Reads the variables for model.apply from a step folder.

  Args:
    folder: checkpoints/STEP.
    abstract_variables: shapes and shardings, as model.init gives them.
    ema: whether the run kept a moving average, which then replaces the parameters.

  Raises:
    UserError: the checkpoint is damaged, or from another model.
  """
  collections = dict(abstract_variables)
  folder = folder if storage.is_remote(folder) else os.path.abspath(folder)
  params = collections.pop('params')
  wanted = {'params': params, 'collections': collections} | ({'ema': params} if ema else {})
  try:
    model = reading.read(folder, {'model': wanted})['model']
  except reading.Damaged as proof:
    raise UserError(f'checkpoint {folder} is damaged ({proof}); use an earlier one') from proof
  return {'params': model['ema' if ema else 'params'], **model['collections']}


def _quieten():
  """Hides Orbax's log lines; its errors are still raised."""
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger('orbax').setLevel(logging.CRITICAL)
  # A full disk fails many writes at once; we report one line instead of many tracebacks.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _without_echoes


def _without_echoes(unraisable):
  # After a failed write Orbax closes its event loop, and each unfinished array prints a traceback.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)
