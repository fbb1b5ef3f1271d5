"""Transfers parameters of an earlier run to a new run."""

import collections
from collections.abc import Iterator
import dataclasses

from flax import traverse_util
import jax
import numpy as np

from xmodal.errors import UserError
from xmodal.models import lora
from xmodal.models.lora import Lora, is_adapter
from xmodal.sharding import mesh as meshes
from xmodal.sharding.rules import spec_for
from xmodal.train.start.earlier import EarlierRun
from xmodal.train.start.fits import Fit, ModelSpec, fit
from xmodal.train.steps.state import TrainState

_ADAPTER = ('lora_a', 'lora_b')
_MOST = 6  # names in a line


@dataclasses.dataclass(frozen=True)
class _Match:
  """How one variable of the new run is made.

  Attributes:
    sources: keys of the earlier run's variables: one, or a kernel and its two adapters.
    fit: how to make the new variable from them.
  """

  sources: tuple[tuple[str, str], ...]
  fit: Fit


class Transfer:
  """Matches variables of an earlier run with those of a new run; `fill` reads them."""

  def __init__(self, earlier: EarlierRun, abstract: TrainState, spec: ModelSpec, adapters: Lora,
               mesh):
    """
    Args:
      earlier: the earlier run.
      abstract: shapes and shardings of the new run.
      spec: spec of the new model.
      adapters: LoRA settings of the new model.
      mesh: the device mesh.

    Raises:
      UserError: nothing fits.
    """
    self._earlier, self._mesh = earlier, mesh
    self._variables = _flat(abstract.params, abstract.collections)
    self._old, self._new = earlier.spec(), spec
    self._lora = Lora(**earlier.config.model.lora)
    self._scale_is_same = (self._lora.alpha / self._lora.rank == adapters.alpha / adapters.rank)
    self._matches, self._misfits = {}, {}
    # Kernels first: a bias is useless without its kernel.
    for key in sorted(self._variables, key=lambda key: not key[1].endswith('/kernel')):
      if key in earlier.taken and not is_adapter(key[1]):
        self._match(key)
    if not self._matches:
      why = _some(list(self._misfits.values()) or _groups(path for _, path in earlier.taken), 3)
      raise UserError(
          f'config.train.start_from: none of the {len(earlier.taken)} parameters selected from '
          f'{earlier.folder} fits this model ({why}); change config.model, or use another run')

  @property
  def taken(self) -> frozenset[str]:
    """Paths of the new model's variables that come from the earlier run."""
    return frozenset(path for _, path in self._matches)

  def _match(self, key):
    collection, path = key
    there, here = self._earlier.shapes[key].shape, self._variables[key].shape
    if path.endswith('/bias') and f'{path.removesuffix("bias")}kernel' in self._misfits:
      self._misfits[path] = f'{path}, as its kernel'
      return
    found = fit(path, there, here, self._old, self._new)
    if found is None:
      self._misfits[path] = f'{path} {list(there)} there, {list(here)} here'
      return
    layer = path.removesuffix('/kernel')
    pair = [(collection, f'{layer}/{name}') for name in _ADAPTER]
    shapes = self._earlier.shapes
    if layer == path or pair[0] not in shapes:
      self._matches[key] = _Match((key,), found)
    elif not found.how and self._scale_is_same and all(
        own in self._variables and own in self._earlier.taken
        and self._variables[own].shape == shapes[own].shape for own in pair):
      self._matches |= {own: _Match((own,), Fit()) for own in (key, *pair)}
    else:  # merged, as the adapters' training would be lost otherwise
      self._matches[key] = _Match((key, *pair), dataclasses.replace(
          found, how='; '.join(filter(None, ('adapters merged', found.how)))))

  def report(self) -> Iterator[str]:
    """Yields lines on loaded, fitted, ignored and mismatched parameters."""
    fits = collections.defaultdict(list)
    for (_, path), match in self._matches.items():
      fits[match.fit.how].append(path)
    what = ' (its moving average)' if self._earlier.is_average else ''
    loaded = fits.pop('', ())
    used = {own for match in self._matches.values() for own in match.sources}
    unused = [path for own in self._earlier.shapes if own not in used for path in own[1:]]
    yield (f'start from {self._earlier.folder}{what}: {len(loaded)} tensors loaded, '
           f'{len(self._matches) - len(loaded)} fitted, {len(unused)} ignored'
           + (f': {_some(_groups(unused))}' if unused else ''))
    for how, names in fits.items():
      yield f'fitted: {_some(_groups(names))}: {how}'
    if self._misfits:
      yield f'not loaded, as shapes differ: {_some(list(self._misfits.values()), 3)}'

  def fill(self, params, collections):
    """Returns params and collections with the earlier run's values in place of initial ones.

    Each device reads only its own shards, except of position tables, which are small and
    replicated. Raises UserError if they cannot be read.
    """
    wanted = {}
    for match in self._matches.values():
      for own in match.sources:
        wanted[own] = self._struct(own, match.fit.is_whole)
    read, values = self._earlier.read(wanted), _flat(params, collections)
    fitted = {}
    for key, match in self._matches.items():
      if match.fit.is_whole:
        values[key] = _placed(match.fit, read[match.sources[0]], values[key])
      elif match.fit.how:
        fitted[key] = values[key], [read[own] for own in match.sources]
      else:
        values[key] = read[key]
    shardings = {key: value.sharding for key, (value, _) in fitted.items()}
    values |= jax.jit(self._fitted, out_shardings=shardings)(fitted)
    tree = traverse_util.unflatten_dict(
        {(collection, *path.split('/')): value for (collection, path), value in values.items()})
    return tree.pop('params'), tree

  def _struct(self, key, is_whole):
    """Shape, dtype and sharding to read a variable of the earlier run with."""
    struct, name = self._earlier.shapes[key], key[1] if key[0] == 'params' else '/'.join(key)
    sharding = meshes.replicated(self._mesh) if is_whole else jax.sharding.NamedSharding(
        self._mesh, spec_for(name, struct.shape, self._mesh))
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

  def _fitted(self, pairs):
    """Maps {key: (initial value, arrays of the earlier run)} to {key: value}."""
    made = {}
    for key, (value, arrays) in pairs.items():
      layer = dict(zip(('kernel', *_ADAPTER), arrays))
      merged = lora.merge({'layer': layer}, self._lora)['layer']['kernel']
      made[key] = self._matches[key].fit.make(value, merged)
    return made


def _placed(fit, whole, value):
  """Applies `fit` to a full array on each host; places the result with the sharding of `value`."""
  made = np.asarray(fit.make(None, np.asarray(whole)), value.dtype)
  return jax.make_array_from_callback(value.shape, value.sharding, lambda index: made[index])


def _flat(params, collections):
  """{(collection, path): leaf}."""
  return {(name, path): leaf for name, tree in {'params': params, **collections}.items()
          for path, leaf in traverse_util.flatten_dict(tree, sep='/').items()}


def _groups(names) -> list[str]:
  """The names if few; else their modules with counts."""
  names = list(names)
  if len(names) <= _MOST:
    return names
  counts = collections.Counter('/'.join(name.split('/')[:-1][:3]) or name for name in names)
  return [f'{module} ({count})' for module, count in counts.items()]


def _some(names, most=_MOST) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
