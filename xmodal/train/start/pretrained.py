"""Towers initialised from pretrained checkpoints."""

import collections
from collections.abc import Collection, Iterator, Mapping
import dataclasses
import json
import os

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from xmodal.errors import UserError
from xmodal.models.lora import is_adapter
from xmodal.pretrained.checkpoint import Checkpoint
from xmodal.pretrained.families import family_module, family_name
from xmodal.pretrained.preprocessing import Preprocessing

PARTS = ('vision', 'text')
_FILE = 'towers.json'
# Fields set by the run, not by the tower's checkpoint.
_OF_THE_RUN = ('parent', 'name', 'dtype', 'remat', 'attention', 'dropout_rate', 'scan_unroll')


@dataclasses.dataclass(frozen=True)
class Tower:
  """A pretrained tower without its weights.

  Attributes:
    family: name of a file of xmodal.pretrained.
    module: the Flax module that the checkpoint describes.
    preprocessing: image preprocessing of a vision tower; None for text.
  """

  family: str
  module: nn.Module
  preprocessing: Preprocessing | None

  def clone(self, **fields) -> nn.Module:
    """The module with other field values; ignores fields that it lacks."""
    own = {field.name for field in dataclasses.fields(self.module)}
    return self.module.clone(**{key: value for key, value in fields.items() if key in own})


def open_checkpoints(config, without: Collection[str] = ()) -> dict[str, Checkpoint]:
  """Opens the checkpoints that config.model.vision.pretrained and .text.pretrained name, by part.

  Args:
    config: the whole config.
    without: parts to skip, as an earlier run provides them.

  Raises:
    UserError: one cannot be read, belongs to the other part, or is not a tower.
  """
  opened = {}
  for part in PARTS:
    name = config.model[part].pretrained
    if name and part not in without:
      opened[part] = Checkpoint(name, part)
      found = opened[part].part
      if found not in PARTS:
        raise UserError(f'config.model.{part}.pretrained={name!r} is a {found}, a {part} tower is '
                        'wanted; use it directly with xmodal.pretrained.load')
      if found != part:
        raise UserError(f'config.model.{part}.pretrained={name!r} is a {found} tower; '
                        f'set it as config.model.{found}.pretrained')
  return opened


def towers_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Tower]:
  """The towers of the checkpoints, by part."""
  return {part: Tower(c.family, c.module, c.preprocessing)
          for part, c in checkpoints.items()}


def save_towers(towers: Mapping[str, Tower], folder: str) -> None:
  """Writes descriptions of the towers into a folder; nothing if there are none."""
  if not towers:
    return
  described = {}
  for part, tower in towers.items():
    described[part] = {'family': tower.family, 'fields': _fields(tower.module),
                       'preprocessing': tower.preprocessing and tower.preprocessing._asdict()}
  with open(os.path.join(folder, _FILE), 'w', encoding='utf-8') as f:
    json.dump(described, f, indent=2)


def load_towers(folder: str) -> dict[str, Tower]:
  """Reads the towers that save_towers wrote."""
  path = os.path.join(folder, _FILE)
  if not os.path.exists(path):
    return {}
  try:
    with open(path, encoding='utf-8') as f:
      described = json.load(f)
  except ValueError as error:  # not JSON, or not UTF-8
    raise UserError(f'{path} is damaged ({error}); use that of another checkpoint of the run'
                    ) from error
  return {part: Tower(
      d['family'], _module(d),
      Preprocessing(**_tuples(d['preprocessing'])) if d['preprocessing'] else None)
          for part, d in described.items()}


def _fields(module):
  """A module's fields, of which one may be a module itself."""
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)
            if f.name not in _OF_THE_RUN}
  return {name: {'family': family_name(value), 'fields': _fields(value)}
          if isinstance(value, nn.Module) else value for name, value in fields.items()}


def _module(described):
  fields = {name: _module(value) if isinstance(value, dict) else value
            for name, value in described['fields'].items()}
  return family_module(described['family']).MODULE(**_tuples(fields))


def _tuples(fields):
  return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


class Loader:
  """Loads the weights of checkpoints and of an earlier run into a model's state."""

  def __init__(self, checkpoints: Mapping[str, Checkpoint], backbone, abstract,
               transfer=None):
    """Finds every tensor; reads none yet.

    Args:
      checkpoints: by part.
      backbone: the model's Backbone.
      abstract: TrainState of shapes and shardings.
      transfer: a train.start.transfer.Transfer from an earlier run, or None; covers other towers.

    Raises:
      UserError: a tensor is missing, has another shape, or matches no parameter.
    """
    self._params, self._transfer = abstract.params, transfer
    self._plans = {part: checkpoint.plan(getattr(backbone, f'{part}_tower'),
                                         _tower_shapes(abstract, part))
                   for part, checkpoint in checkpoints.items()}
    self._names = {part: checkpoint.folder for part, checkpoint in checkpoints.items()}

  def report(self) -> Iterator[str]:
    """Yields lines on loaded, fitted, ignored and new parameters."""
    if not self._plans and self._transfer is None:
      return
    for part, plan in self._plans.items():
      yield f'{part} tower from {self._names[part]}: {plan.report}'
    if self._transfer:
      yield from self._transfer.report()
    flat = traverse_util.flatten_dict(self._params, sep='/')
    loaded = tuple(f'backbone/{part}_tower/' for part in self._plans)
    taken = self._transfer.taken if self._transfer else ()
    new = [path for path in flat if path not in taken
           and (not path.startswith(loaded) or is_adapter(path))]
    if new:
      yield f'newly initialised: {", ".join(_modules(new, flat))}; {len(new)} in all'

  def fill(self, state):
    """Returns a TrainState with loaded weights in place of random ones."""
    params, collections = (traverse_util.flatten_dict(tree) for tree in
                           (state.params, state.collections))
    for part, plan in self._plans.items():
      variables = traverse_util.flatten_dict(plan.read())
      for (collection, *path), array in variables.items():
        path = ('backbone', f'{part}_tower', *path)
        if collection == 'params':
          params[path] = array
        else:
          collections[(collection, *path)] = array
    params, collections = map(traverse_util.unflatten_dict, (params, collections))
    if self._transfer:
      params, collections = self._transfer.fill(params, collections)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, collections=collections, ema=ema)


def _modules(new, every):
  """The modules of new parameters; with counts for modules that are only partly new."""
  def module(path):
    return '/'.join(path.split('/')[:2]) + (' (adapters)' if is_adapter(path) else '')

  counts, totals = (collections.Counter(map(module, paths)) for paths in (new, every))
  return sorted(name if count == totals[name] else f'{name} ({count} of {totals[name]})'
                for name, count in counts.items())


def _tower_shapes(abstract, part):
  """{'params': ..., other collections} of one tower, without adapters, which are in no file."""
  variables = {'params': abstract.params, **abstract.collections}
  inside = ('backbone', f'{part}_tower')
  flat = {}
  for (collection, *path), struct in traverse_util.flatten_dict(variables).items():
    if tuple(path[:2]) == inside and not is_adapter('/'.join(path)):
      flat[(collection, *path[2:])] = struct
  return traverse_util.unflatten_dict(flat)
