"""Resolves the name of a checkpoint on the HuggingFace hub to a local folder."""

import fnmatch
import os

from xmodal import downloads, paths, storage
from xmodal.errors import UserError

# Files to download: weights, config and tokenizer; no pickles, no copies for other libraries.
_FILES = ['config.json', 'preprocessor_config.json', 'processor_config.json', 'model.safetensors',
           'model.safetensors.index.json', 'model-?????-of-?????.safetensors', 'tokenizer.json',
           'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
           'spiece.model', 'sentencepiece.bpe.model', 'vocab.txt', 'vocab.json', 'merges.txt']
# Environment variables for the hub library's download cache; its default is the home folder.
_CACHES = {'HF_HOME', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME'}


def find_folder(name: str) -> str:
  """A local folder itself; a copy of a folder in a bucket, or of the hub's repository of that name.

  Raises:
    UserError: no such folder, no such repository, or no network.
  """
  path = paths.resolved(name, 'checkpoint')
  if storage.is_dir(os.path.join(path, 'checkpoints')) and not storage.is_file(
      os.path.join(path, 'model.safetensors')):
    raise UserError(f'{name}: is a run of xmodal; wanted a checkpoint in HuggingFace form, such as '
                    f'xmodal export --checkpoint {name} --part vision --output DIR writes')
  if storage.is_remote(path):
    if not storage.is_dir(path):
      storage.check_bucket(path)
      raise UserError(f'{name}: no such folder; wanted one with config.json and model.safetensors')
    return downloads.copy(path, lambda file: any(fnmatch.fnmatch(file, one) for one in _FILES))
  if os.path.isdir(path):
    return path
  if os.path.exists(path):
    raise UserError(f'{name}: is a file; wanted the folder of a checkpoint (config.json and '
                    'model.safetensors)')
  if name.startswith(('.', '/', '~')) or name.count('/') > 1:
    raise UserError(f'{name}: no such folder; wanted one with config.json and model.safetensors, '
                    'or the name of a checkpoint on the HuggingFace hub')
  if not paths.home() and not _CACHES & os.environ.keys():
    raise UserError(f'{name}: no such folder, and this user has no home folder for downloads from '
                    'the HuggingFace hub; set HF_HOME to a folder, or give the folder of a copy')
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
  )
  try:
    return snapshot_download(name, allow_patterns=_FILES)
  except (HFValidationError, RepositoryNotFoundError) as error:
    raise UserError(f'{name}: neither a folder here nor a checkpoint on the HuggingFace hub that '
                    'you may read; check the name, or `hf auth login` if it is gated') from error
  except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
    raise UserError(f'{name}: the HuggingFace hub cannot be reached and its cache has no copy; '
                    'connect, or give the folder of a copy (config.json, model.safetensors, '
                    'tokenizer files) instead of the name') from error
