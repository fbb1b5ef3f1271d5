"""The files of a bundle: their checks, and arrays of safetensors without that package.

A bundle holds a copy of this file beside model.py.
"""

import hashlib
import json
import os

import jax.numpy as jnp
import numpy as np

_DTYPES = {'F32': np.float32, 'BF16': jnp.bfloat16, 'F16': np.float16, 'I8': np.int8,
           'U8': np.uint8, 'I32': np.int32, 'U32': np.uint32, 'BOOL': np.bool_}


class BundleError(ValueError):
  """What the user can fix, in one line."""


def check_file(path, stated, checksum):
  if not os.path.isfile(path) or os.path.getsize(path) != stated['bytes']:
    found = f'{os.path.getsize(path)} bytes' if os.path.isfile(path) else 'missing'
    raise BundleError(f'{path}: {found}, wanted {stated["bytes"]} bytes; copy the bundle again')
  if checksum:
    with open(path, 'rb') as f:
      if hashlib.file_digest(f, 'sha256').hexdigest() != stated['sha256']:
        raise BundleError(f'{path}: damaged (its checksum differs); copy the bundle again')


def read_tensors(path):
  """Arrays of a safetensors file by name, mapped from disk."""
  with open(path, 'rb') as f:
    length = int.from_bytes(f.read(8), 'little')
    header = json.loads(f.read(length))
  data = np.memmap(path, np.uint8, 'r', offset=8 + length)
  return {name: data[slice(*one['data_offsets'])].view(_DTYPES[one['dtype']]).reshape(one['shape'])
          for name, one in header.items() if name != '__metadata__'}
