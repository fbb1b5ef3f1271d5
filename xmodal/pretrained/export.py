"""Writes a tower to a folder that transformers loads."""

import json
import os
import shutil

from flax import linen as nn
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from xmodal import storage
from xmodal.errors import UserError
from xmodal.models.towers.t5 import T5
from xmodal.pretrained.families import family_of_module
from xmodal.pretrained.preprocessing import FILE, Preprocessing
from xmodal.pretrained.tensors import write_tensors

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def save(folder: str, module: nn.Module, variables, *, preprocessing: Preprocessing | None = None,
         save_tokenizer=None, dtype: str = 'float32') -> None:
  """Writes config.json, model.safetensors, and the preprocessing or tokenizer of a tower.

  Args:
    folder: created completely or not at all; must not exist, or be empty.
    module: a tower.
    variables: its variables, {'params': ..., ...}; missing parts (a decoder) are left out.
    preprocessing: preprocessing of a vision tower's pictures.
    save_tokenizer: for a text tower, a function (folder) -> None that writes its tokenizer.
    dtype: dtype of the tensors in the file, 'float32' or 'bfloat16'.

  Raises:
    UserError: the folder is not empty, or transformers has no such tower.
  """
  check_new(folder)
  family, head_dim = family_of_module(module), getattr(module, 'head_dim', None)
  if head_dim and not isinstance(module, T5) and head_dim * module.num_heads != module.hidden_dim:
    raise UserError(f'transformers has no {type(module).__name__} with {module.num_heads} heads of '
                    f'width {head_dim} and tokens of width {module.hidden_dim}, as pruning makes '
                    'them; export the run that it was made of')
  if hasattr(family, 'trimmed'):
    module = family.trimmed(module, variables)
  config = {**family.config_from_module(module), 'dtype': dtype}
  tensors = {name: array.astype(DTYPES[dtype])
             for name, array in write_tensors(variables, family.entries(module, module)).items()}
  if hasattr(family, 'extra_tensors'):
    tensors |= family.extra_tensors(module)
  part = f'{os.path.abspath(folder)}.part'
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(part)
  try:
    _write_json(os.path.join(part, 'config.json'), config)
    # transformers requires this metadata.
    save_file(tensors, os.path.join(part, 'model.safetensors'), metadata={'format': 'pt'})
    if preprocessing is not None:
      _write_json(os.path.join(part, FILE), preprocessing.to_config())
    if save_tokenizer is not None:
      save_tokenizer(part)
    if os.path.isdir(folder):
      os.rmdir(folder)
    os.rename(part, folder)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def check_new(folder: str) -> None:
  """Raises UserError if the folder exists and is not empty, or its bucket does not."""
  if storage.is_remote(folder):
    storage.check_bucket(folder)
  if storage.exists(folder) and (not storage.is_dir(folder) or storage.list_dir(folder)):
    raise UserError(f'{folder}: already exists; name a folder that is new or empty')


def _write_json(path, value):
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(value, f, indent=2)
    f.write('\n')
