"""Reads a checkpoint folder of a known family: its module, variables and preprocessing."""

import collections
from collections.abc import Mapping
import dataclasses
import re

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from xmodal.errors import UserError
from xmodal.pretrained.families import family_module, family_of, read_config
from xmodal.pretrained.files import FLOATS, TensorFiles
from xmodal.pretrained.hub import find_folder
from xmodal.pretrained.preprocessing import read_preprocessing
from xmodal.pretrained.tensor_names import tower_names
from xmodal.pretrained.tensors import TensorMatch, match_variables


@dataclasses.dataclass(frozen=True)
class LoadReport:
  """The outcome of loading the tensors of a checkpoint.

  Attributes:
    loaded: names of the tensors in the model.
    fitted: one line per resized variable (positions for another picture size).
    ignored: names of the tensors that the model does not use.
  """

  loaded: tuple[str, ...]
  fitted: tuple[str, ...]
  ignored: tuple[str, ...]

  def __str__(self) -> str:
    lines = [f'{len(self.loaded)} tensors loaded']
    lines += [f'fitted: {line}' for line in self.fitted]
    if self.ignored:
      lines.append(f'{len(self.ignored)} ignored: {_some(_modules(self.ignored))}')
    return '; '.join(lines)


def _modules(names, most=6):
  """The names, or if there are many, their modules with counts: 'bert.pooler.* (2)'."""
  if len(names) <= most:
    return names
  counts = collections.Counter('.'.join(name.split('.')[:-1][:2]) or name for name in names)
  return [module if module in names else f'{module}.* ({n})' for module, n in counts.items()]


def _some(names, most=6):
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


class Checkpoint:
  """A tower in published files: `config.json`, safetensors, preprocessing.

  Attributes:
    folder: path of the files.
    config: config.json, with missing keys set to the family's defaults.
    family: the module of xmodal.pretrained that reads it.
    part: 'vision', 'text' or 'detector'.
    module: the Flax module that the config describes.
    preprocessing: a vision tower's preprocessing; None for text, and for a detector, which takes
      any size (see `detections.pad_pictures`).
  """

  def __init__(self, name: str, part: str | None = None):
    """Reads the config and the names of tensors of a folder, or of a checkpoint on the hub.

    Args:
      name: a folder, or a name on the hub.
      part: 'vision' takes the backbone and encoder of a detector.

    Raises:
      UserError: it does not exist, is of an unknown family, or is incomplete.
    """
    self.folder = find_folder(name)
    self._files = TensorFiles(self.folder)
    self.config = read_config(self.folder, self._files)
    self.family = family_of(self.config, self.folder, part)
    self._family = family_module(self.family)
    self.part = self._family.PART
    try:
      tied = self._family.tied(self.config) if hasattr(self._family, 'tied') else {}
      self._names = tower_names(self._files, self._family, tied)
      self._tensors = _Renamed(self._files, self._names.files)
      self.module = self._family.module_from_config(self.config, self._tensors)
      self.module.check()
    except UserError as error:
      raise UserError(f'{self.folder}: {error}') from error
    except KeyError as error:
      raise UserError(f'{self.folder}/config.json: {error} is missing; copy it again') from error
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
      raise UserError(f'{self.folder}/config.json: has a value that is invalid '
                      f'for {self.config["model_type"]} ({error}); copy it again') from error
    self.preprocessing = read_preprocessing(
        self.folder, self.config, self._family.PREPROCESSING,
        getattr(self.module, 'image_size', None)) if self.part == 'vision' else None

  def plan(self, module: nn.Module | None = None, shapes=None) -> 'LoadPlan':
    """Matches tensors to a module's variables; reads only their shapes.

    Args:
      module: `self.module`, or a clone of it with another image_size, dtype or
        vocab_size.
      shapes: pytree of jax.ShapeDtypeStruct of the variables to load, if not all
        (a T5 without its decoder).

    Raises:
      UserError: a tensor is missing, has another shape, or is unknown to the model.
    """
    module = module or self.module
    entries, files = list(self._family.entries(module, self.module)), self._names.files
    whole = self._family.variable_shapes(module)
    try:
      matches = match_variables({own: self._files.shape(name) for own, name in files.items()},
                                entries, shapes or whole)
    except UserError as error:
      raise UserError(f'{self.folder}: {error}') from error
    used = {name for match in matches.values() for name in match.names}
    loaded = {files[name] for name in used}
    self._check_dtypes(loaded)
    # Parts that are not requested (a decoder) are allowed; surplus layers are not.
    known = used | _named_by([e for e in entries if e.path not in matches], files)
    paths = traverse_util.flatten_dict(whole, sep='/')
    modules = {entry.name.split('.')[0] for entry in entries if entry.path in paths}
    if unknown := [files[name] for name in self._names.within(modules)
                   if name not in known and not re.fullmatch(self._family.IGNORE, name)]:
      raise UserError(f'{self.folder}: {len(unknown)} tensors have no place in the model: '
                      f'{_some(sorted(unknown))}; does config.json belong to them? (Merge adapters '
                      'and dequantise quantised weights first.)')
    return LoadPlan(self._tensors, matches, LoadReport(
        loaded=tuple(sorted(loaded)),
        fitted=tuple(match.note for match in matches.values() if match.note),
        ignored=tuple(sorted(set(self._files) - loaded))))

  def _check_dtypes(self, names):
    for name in sorted(names):
      if self._files.dtype(name) not in FLOATS:
        raise UserError(f'{self.folder}: tensor {name} is {self._files.dtype(name)}, wanted one of '
                        f'{", ".join(FLOATS)}; dequantise it first')

  def load(self, module: nn.Module | None = None, shapes=None) -> tuple[dict, LoadReport]:
    """The variables for module.apply, and the report on the tensors; see `plan`."""
    plan = self.plan(module, shapes)
    return plan.read(), plan.report


@dataclasses.dataclass(frozen=True)
class LoadPlan:
  """Variables, and the tensors to read them from.

  Attributes:
    report: which tensors are loaded, fitted and ignored.
  """

  _tensors: Mapping[str, np.ndarray]
  _matches: Mapping[str, TensorMatch]
  report: LoadReport

  def read(self) -> dict:
    """Reads the variables, {'params': ..., ...}, one after the other.

    Variables whose struct has a sharding become jax.Arrays, of which each device
    gets its own shard; the others are numpy arrays.
    """
    return traverse_util.unflatten_dict(
        {path: _placed(match.read(self._tensors), match.struct)
         for path, match in self._matches.items()}, sep='/')


class _Renamed(Mapping[str, np.ndarray]):
  """Tensors by the tower's own names."""

  def __init__(self, files: TensorFiles, names: Mapping[str, str]):
    self._files, self._names = files, names

  def __getitem__(self, name):
    return self._files[self._names[name]]

  def __iter__(self):
    return iter(self._names)

  def __len__(self):
    return len(self._names)


def load(name: str, **fields) -> tuple[nn.Module, dict]:
  """A tower and its parameters, from a folder or from the HuggingFace hub.

      module, variables = load('google/vit-base-patch16-224')
      tokens = module.apply(variables, images)          # [B, 1 + N, D]

      t5, variables = load('google/flan-t5-base')
      encoded = t5.apply(variables, tokens, mask, method='encode')   # [B, L, D]

  Vision towers take float images [B, H, W, 3], normalised as in
  Checkpoint.preprocessing; text towers take int32 tokens and a bool mask [B, L];
  detectors take the output of `detections.pad_pictures`.

  Args:
    name: folder with config.json and model.safetensors, or a name on the hub.
    **fields: fields of the module to override: dtype, image_size (positions are
      interpolated as the family does), dropout_rate, remat, ...

  Returns:
    The Flax module and its variables, float32 arrays.

  Raises:
    UserError: it does not exist, is of an unknown family, or is incomplete.
  """
  checkpoint = Checkpoint(name)
  module = checkpoint.module.clone(**fields)
  return module, checkpoint.load(module)[0]


def _placed(array, struct):
  """The array on the struct's devices; the callback is called for local shards only."""
  if getattr(struct, 'sharding', None) is None:
    return array
  return jax.make_array_from_callback(array.shape, struct.sharding, lambda index: array[index])


def _named_by(entries, names):
  """The names that match any entry, whether it is loaded or not (an unused decoder)."""
  known = re.compile('|'.join(re.escape(entry.name).replace(r'\{\}', r'\d+') for entry in entries))
  return {name for name in names if known.fullmatch(name)}
