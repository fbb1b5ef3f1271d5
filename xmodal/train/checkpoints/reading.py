"""Reads the items of a checkpoint, and proves damage."""

import contextlib
import functools
import os
import sys
import time

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xmodal import storage
from xmodal.errors import UserError
from xmodal.sharding.rules import path_name
from xmodal.train.checkpoints import alias, damage
from xmodal.train.process import together

# Seconds to wait before each further attempt to read an item.
PAUSES = (1, 5, 15)


def fingerprint(tree) -> np.ndarray:
  """A uint32 checksum of a tree of 4-byte arrays; changes with any bit.

  Orbax's checksums cover its index but not the arrays: a flipped bit on disk would become a wrong
  parameter. Devices sum their own shards; whole copies in a CPU's memory are summed by NumPy.
  """
  sums = jax.device_get([_weighted_sum(leaf) for leaf in jax.tree.leaves(tree)])
  total = sum(int(of_leaf) * (2 * number + 1) for number, of_leaf in enumerate(sums))
  return np.asarray(total % 2**32, np.uint32)


def _weighted_sum(leaf):
  """Sum of the words times odd weights: no changed word can vanish modulo 2^32."""
  if isinstance(leaf, np.ndarray) or (
      leaf.is_fully_replicated and next(iter(leaf.devices())).platform == 'cpu'):
    words = np.asarray(leaf).view(np.uint32).ravel()
    return np.dot(words, 2 * np.arange(words.size, dtype=np.uint32) + 1)
  return _weighted_sum_on_device(leaf)


@jax.jit  # of one array: many have the same shape, and one program of all compiles for seconds
def _weighted_sum_on_device(leaf):
  bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(bits.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


class Damaged(Exception):
  """A checkpoint differs, provably, from what was written."""


def read(folder, abstract):
  """Reads items of a checkpoint, by name, with the shapes and shardings of `abstract`.

  All processes return or raise the same.

  Raises:
    Damaged: an item is damaged.
    UserError: the checkpoint is from another model, or cannot be read now.
  """
  items = _read_together(folder, {
      item: functools.partial(_read_once, folder, item, tree) for item, tree in abstract.items()})
  for item, of_item in items.items():  # a collective computation: all processes or none
    if int(fingerprint(of_item['arrays'])) != int(of_item['fingerprint']):
      raise Damaged(f'{item}: an array has changed since it was written')
  return {item: of_item['arrays'] for item, of_item in items.items()}


def read_some(folder, item, abstract):
  """Reads some arrays of an item; all processes return or raise the same.

  The stored fingerprint covers all arrays, so it cannot check these: `damage.find_damage` checks
  the files.

  Args:
    folder: checkpoints/STEP.
    item: name of the item.
    abstract: {key: shape, dtype and sharding}, with keys from `stored`.

  Raises:
    Damaged: the item is damaged.
    UserError: it cannot be read now.
  """
  return _read_together(folder, {
      item: functools.partial(_read_some_once, folder, item, abstract)})[item]


def stored(folder, item):
  """Shapes and dtypes of an item's arrays, by key (a tuple), as this process reads them.

  Raises:
    Damaged: the item is damaged.
    UserError: it cannot be read now.
  """
  def look():
    with alias.SafePath(folder) as usable:
      found = ocp.StandardCheckpointHandler().metadata(epath.Path(usable, item))
    keys = {tuple(path_name(path).split('/')): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(_tree(found))[0]}
    return {key[1:]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for key, leaf in keys.items() if key[0] == 'arrays'}

  return _read_patiently(folder, item, look)


def _read_together(folder, actions):
  """Runs the actions on this process; returns their results by item, or raises on all."""
  items, proof = {}, ''

  def read_all():
    nonlocal proof
    try:
      for item, action in actions.items():
        items[item] = _read_patiently(folder, item, action)
    except Damaged as damaged:
      proof = str(damaged) + (f' (seen by {together.here()})' if jax.process_count() > 1 else '')
    return ''

  together.agree(read_all)
  for found in filter(None, together.gather(proof)):
    raise Damaged(found)
  return items


def _read_patiently(folder, item, action):
  """Reads one item with an action, with retries; raises Damaged only if damage is proven."""
  path = os.path.join(folder, item)
  for pause in (*PAUSES, None):
    try:
      with storage.explained(folder):
        return action()
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      error = _wrapped(error)
      try:
        proof = damage.find_damage(path)
      except OSError as other:
        error, proof = other, ''
      if proof:
        raise Damaged(f'{item}: {proof}') from error
      if isinstance(error, UserError):  # undamaged, but from another model
        raise error
      if not _of_storage(error):
        raise
      if pause is None:
        reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [''])[0][:200]
        raise UserError(
            f'checkpoint {folder} cannot be read ({reason or type(error).__name__}), and nothing '
            'proves that it is damaged, so it was kept: fix that and run the same command again, '
            'or move that folder away to resume from the previous checkpoint') from error
    time.sleep(pause)


def _of_storage(error):
  # TensorStore raises ValueError, too.
  return isinstance(error, (OSError, ValueError, KeyError)) or type(error) is Exception


def _read_once(folder, item, abstract):
  one_number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=_any_sharding(abstract))
  wanted = {'arrays': abstract, 'fingerprint': one_number}
  with _quiet_path(folder, item) as path:
    handler = ocp.StandardCheckpointHandler()
    _check_same_model(handler.metadata(path), wanted, folder)
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
      return reader.restore(path, args=ocp.args.StandardRestore(wanted))


def _read_some_once(folder, item, abstract):
  wanted = {'arrays': traverse_util.unflatten_dict(abstract)}
  with _quiet_path(folder, item) as path, ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as reader:
    read = reader.restore(path, args=ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True))
  return traverse_util.flatten_dict(read['arrays'])


@contextlib.contextmanager
def _quiet_path(folder, item):
  """Context manager: a path to an item; silences tracebacks of threads meanwhile."""
  # Orbax's reader threads print their own tracebacks when a file is broken.
  hook, sys.excepthook = sys.excepthook, lambda *_: None
  try:
    with alias.SafePath(folder) as usable:  # the step's folder, as the item may be missing
      yield epath.Path(usable, item)
  finally:
    sys.excepthook = hook


def _alone():
  """Options under which Orbax waits for no other process, as a failed one would never arrive."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process{me}')


def _wrapped(error):
  """The cause of an error that Orbax wraps in a plain Exception."""
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

  there, needed = shapes(_tree(metadata)), shapes(wanted)
  for name in sorted(there.keys() | needed.keys()):
    if there.get(name) != needed.get(name):
      raise UserError(
          f'checkpoint {folder} is from another model: {name} is '
          f'{there.get(name, "missing")} there and {needed.get(name, "missing")} here; use the '
          'config and the version of xmodal that it was trained with, or another --workdir')


def _tree(metadata):
  """Orbax's metadata of an item's arrays, which some versions wrap in another object."""
  return getattr(metadata, 'item_metadata', metadata)
