"""Resizes position embeddings to a picture size other than the one they were trained at."""

import numpy as np

from xmodal.errors import UserError

# Parameter of the cubic kernel (Keys, 1981): PyTorch's, and Pillow's with antialiasing.
_SHARPNESS, _SHARPNESS_ANTIALIASED = -0.75, -0.5


def resize_positions(source, module, antialias=False):
  """Returns a function that resizes a position table from `source`'s grid to `module`'s.

  As in transformers: bicubic, corners not aligned; tokens before the grid (class, distillation)
  keep their rows.

  Args:
    source, module: ViTs, with image_size (height, width) and patch_size.
    antialias: whether to antialias when the grid becomes smaller.

  Returns:
    (table float [P + N, D], target shape) -> float32 table of that shape.
  """
  grids = [tuple(side // m.patch_size for side in m.image_size) for m in (source, module)]

  def fit(table, shape):
    (rows, columns), (new_rows, new_columns) = grids
    first = table.shape[0] - rows * columns
    if first < 0 or shape != (first + new_rows * new_columns, table.shape[1]):
      raise UserError(f'a position table of {list(table.shape)} cannot be made '
                      f'{list(shape)} for a grid of {new_rows} x {new_columns}; does config.json '
                      'belong to it?')
    table = table.astype(np.float32)
    grid = table[first:].reshape(rows, columns, -1)
    weights = antialiased_weights if antialias else cubic_weights
    grid = np.einsum('rh,cw,hwd->rcd', weights(rows, new_rows), weights(columns, new_columns), grid,
                     optimize=True)
    return np.concatenate([table[:first], grid.reshape(-1, table.shape[1])])

  return fit


def cubic_weights(length: int, new_length: int) -> np.ndarray:
  """float32 [new_length, length]: the weight of each old position in each new one."""
  centers = (np.arange(new_length) + 0.5) * (length / new_length) - 0.5
  first = np.floor(centers).astype(int) - 1
  weights = np.zeros((new_length, length))
  for tap in range(4):
    distance = np.abs(centers - (first + tap))
    place = np.clip(first + tap, 0, length - 1)
    np.add.at(weights, (np.arange(new_length), place), _cubic(distance, _SHARPNESS))
  return weights.astype(np.float32)


def antialiased_weights(length: int, new_length: int) -> np.ndarray:
  """As cubic_weights, with the kernel scaled to the spacing of the new positions."""
  scale = length / new_length
  centers = (np.arange(new_length) + 0.5) * scale
  distance = np.abs(np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1)
  weights = _cubic(distance, _SHARPNESS_ANTIALIASED)
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(x, a):
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0))
