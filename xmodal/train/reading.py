"""Reading the items of a checkpoint, and proving that one is damaged."""

import os
import sys
import time

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from xmodal.errors import UserError
from xmodal.sharding.rules import path_name
from xmodal.train import alias, damage, together

# Seconds to wait before each further attempt to read an item.
PAUSES = (1, 5, 15)


@jax.jit
def fingerprint(tree):
  """One uint32 that changes with any bit of a tree of 4-byte arrays.

  Orbax's checksums cover its index but not the arrays: a flipped bit on disk would be read as a
  wrong parameter.
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


class Damaged(Exception):
  """A checkpoint is not what was written: there is proof."""


def read(folder, abstract):
  """Reads items of a checkpoint, with the shapes and shardings of `abstract`, by name.

  Every process returns or raises the same.

  Raises:
    Damaged: one is damaged.
    UserError: it is of another model, or cannot be read now.
  """
  items, proof = {}, ''

  def read_all():
    nonlocal proof
    try:
      for item, tree in abstract.items():
        items[item] = _read_patiently(folder, item, tree)
    except Damaged as damaged:
      proof = str(damaged) + (f' (seen by {together.here()})' if jax.process_count() > 1 else '')
    return ''

  together.agree(read_all)
  for found in filter(None, together.gather(proof)):
    raise Damaged(found)
  for item, of_item in items.items():  # computed over all devices, so by all processes together
    if int(fingerprint(of_item['arrays'])) != int(of_item['fingerprint']):
      raise Damaged(f'{item}: an array has changed since it was written')
  return {item: of_item['arrays'] for item, of_item in items.items()}


def _read_patiently(folder, item, abstract):
  """Reads one item, with retries; raises Damaged only if damage is proven."""
  path = os.path.join(folder, item)
  for pause in (*PAUSES, None):
    try:
      return _read_once(folder, item, abstract)
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:
      error = _wrapped(error)
      try:
        proof = damage.proof(path)
      except OSError as other:
        error, proof = other, ''
      if proof:
        raise Damaged(f'{item}: {proof}') from error
      if isinstance(error, UserError):  # whole, and of another model
        raise error
      if not _of_storage(error):
        raise
      if pause is None:
        reason = getattr(error, 'strerror', None) or (str(error).splitlines() or [''])[0][:200]
        raise UserError(
            f'checkpoint {folder} cannot be read ({reason or type(error).__name__}), and nothing '
            'proves that it is damaged; it was left where it is: put that right and run the same '
            'command again, or move that folder away to go on from the one before') from error
    time.sleep(pause)


def _of_storage(error):
  # The storage library raises ValueError, too.
  return isinstance(error, (OSError, ValueError, KeyError)) or type(error) is Exception


def _read_once(folder, item, abstract):
  one_number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=_any_sharding(abstract))
  wanted = {'arrays': abstract, 'fingerprint': one_number}
  # Orbax's reader threads print their own tracebacks when a file is broken.
  hook, sys.excepthook = sys.excepthook, lambda *_: None
  try:
    with alias.Usable(folder) as usable:  # of the step, as the item may be missing
      path, handler = epath.Path(usable, item), ocp.StandardCheckpointHandler()
      _check_same_model(handler.metadata(path), wanted, folder)
      with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
        return reader.restore(path, args=ocp.args.StandardRestore(wanted))
  finally:
    sys.excepthook = hook


def _alone():
  """Options under which Orbax waits for no other process: a failed one would never arrive."""
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

  stored, needed = shapes(getattr(metadata, 'item_metadata', metadata)), shapes(wanted)
  for name in sorted(stored.keys() | needed.keys()):
    if stored.get(name) != needed.get(name):
      raise UserError(
          f'checkpoint {folder} is of another model: {name} is {stored.get(name, "missing")} there '
          f'and {needed.get(name, "missing")} here; take the config and the version of xmodal that '
          'it was trained with, or another --workdir')
