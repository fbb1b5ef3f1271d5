"""Reads a checkpoint folder in the layout of the HuggingFace hub."""

from collections.abc import Iterator, Mapping
import json
import os

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xmodal.errors import UserError

_WHOLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
# Safetensors' names of the dtypes that its numpy reader does not support.
_FLOAT8 = {'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
           'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz}
FLOATS = ('F64', 'F32', 'F16', 'BF16', *_FLOAT8)  # supported dtypes of weights
# Unpickling these files runs any code they contain.
_PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')


class TensorFiles(Mapping[str, np.ndarray]):
  """The tensors of a folder by name; each is read from disk on access.

  Reads `model.safetensors`, or the shards named by `model.safetensors.index.json`.
  Arrays have the file's dtype (bfloat16 and 8-bit floats are ml_dtypes).
  """

  def __init__(self, folder: str):
    """Opens the files and reads their headers.

    Raises:
      UserError: there are none, one is truncated, or the index names a file or
        tensor that does not exist.
    """
    self.folder = folder
    index = os.path.join(folder, _INDEX)
    if os.path.isfile(os.path.join(folder, _WHOLE)):
      file = self._open(_WHOLE)
      names = file.keys()
      self._files, self._paths = dict.fromkeys(names, file), dict.fromkeys(names, _WHOLE)
    elif os.path.isfile(index):
      self._files, self._paths = self._open_shards(index)
    else:
      raise UserError(_nothing_to_read(folder))

  def _open(self, name):
    path = os.path.join(self.folder, name)
    try:
      return safe_open(path, 'np')
    except (SafetensorError, OSError) as error:
      raise UserError(f'{path}: cut short or not a safetensors file ({error}); copy or download it '
                      'again') from error

  def _open_shards(self, index):
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not names:
      raise UserError(f'{index}: has no "weight_map" of tensors to files; copy it again')
    if missing := sorted({file for file in names.values()
                          if not os.path.isfile(os.path.join(self.folder, file))}):
      raise UserError(f'{index}: {len(missing)} of its files are missing, such as {missing[0]}; '
                      'copy them too')
    files = {file: self._open(file) for file in sorted(set(names.values()))}
    held = {file: set(opened.keys()) for file, opened in files.items()}
    for tensor, file in names.items():
      if tensor not in held[file]:
        raise UserError(f'{index}: tensor {tensor} is not in {file}; copy both again')
    return {tensor: files[file] for tensor, file in names.items()}, names

  def __getitem__(self, name: str) -> np.ndarray:
    if self.dtype(name) in _FLOAT8:
      return self._read_float8(name)
    return self._files[name].get_tensor(name)

  def _read_float8(self, name):
    """Reads a tensor through the file's header: its length (8 bytes), JSON, then the data."""
    with open(os.path.join(self.folder, self._paths[name]), 'rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      first, end = json.loads(f.read(length))[name]['data_offsets']
      f.seek(8 + length + first)
      data = np.frombuffer(f.read(end - first), _FLOAT8[self.dtype(name)])
    return data.reshape(self.shape(name))

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def dtype(self, name: str) -> str:
    """The dtype of a tensor by the file's name for it ('F32'), without reading the tensor."""
    return self._files[name].get_slice(name).get_dtype()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""
    return tuple(self._files[name].get_slice(name).get_shape())


def _nothing_to_read(folder):
  found = sorted(os.listdir(folder))
  if pickles := [name for name in found if name.endswith(_PICKLES)]:
    return (f'{folder}: {pickles[0]} is a pickle, which can run code and is not read; wanted '
            f'{_WHOLE}: if you trust it, load it in transformers and call save_pretrained')
  return (f'{folder}: neither {_WHOLE} nor {_INDEX} is there, found '
          f'{", ".join(found[:8]) or "nothing"}; wanted a folder that save_pretrained wrote')


def read_json(path: str) -> dict:
  """The object in a JSON file; UserError if the file is missing or holds no object."""
  try:
    with open(path, encoding='utf-8') as f:
      value = json.load(f)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); copy it again') from error
  except ValueError as error:
    raise UserError(f'{path}: not JSON ({error}); copy it again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path}: holds no JSON object; copy it again')
  return value
