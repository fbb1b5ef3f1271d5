"""Maps tensors of a file to variables and back, by one table for each model family."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math

from flax import traverse_util
import jax
import numpy as np

from xmodal.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
  """One variable and the tensors it is read from.

  Attributes:
    path: path of the variable, 'params/layers/mlp/up/kernel'.
    name: name of the tensor. '{}' is the number of the layer: the variable is
      then the stack [L, ...] of one tensor per layer.
    layout: a key of LAYOUTS.
    part: (index, count): the variable is this one of count equal parts of the
      tensor, along the output axis (query, key and value in one tensor).
    fit: resizes an array to a shape (positions of another picture size), or
      raises UserError; None: sizes must be equal.
  """

  path: str
  name: str
  layout: str = 'same'
  part: tuple[int, int] = (0, 1)
  fit: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None


def linear(path, name):
  """The entries of a linear layer with a bias."""
  return [Entry(f'{path}/kernel', f'{name}.weight', 'linear'),
          Entry(f'{path}/bias', f'{name}.bias')]


def norm(path, name):
  """The entries of a norm with a bias."""
  return [Entry(f'{path}/scale', f'{name}.weight'), Entry(f'{path}/bias', f'{name}.bias')]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The order of a tensor's axes in the file.

  Attributes:
    file_shape: the shape in the file for a shape of ours.
    to_flax, to_file: convert an array from the file's order to ours, and back.
    output_axis: axis of the file's array that `Entry.part` divides.
  """

  file_shape: Callable[[tuple], tuple]
  to_flax: Callable[[np.ndarray], np.ndarray]
  to_file: Callable[[np.ndarray], np.ndarray]
  output_axis: int = 0


def _patch_file_shape(shape):
  side = math.isqrt(shape[0] // 3)
  return shape[1], 3, side, side


def _patch_to_file(x):
  side = math.isqrt(x.shape[0] // 3)
  return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


LAYOUTS = {
    'same': Layout(lambda s: s, lambda x: x, lambda x: x),
    'linear': Layout(lambda s: (s[1], s[0]), np.transpose, np.transpose),  # [out, in], [in, out]
    'kernel': Layout(lambda s: s, lambda x: x, lambda x: x, output_axis=1),  # [in, out] in both
    'conv': Layout(lambda s: (s[3], s[2], s[0], s[1]), lambda x: x.transpose(2, 3, 1, 0),
                   lambda x: x.transpose(3, 2, 0, 1)),
    # A convolution [D, 3, P, P] and a linear layer over a patch's pixels [P * P * 3, D].
    'patch': Layout(_patch_file_shape, lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
                    _patch_to_file),
    # A convolution of 1 x 1 [out, in, 1, 1] and a linear layer [in, out].
    'pointwise': Layout(lambda s: (s[1], s[0], 1, 1), lambda x: x[:, :, 0, 0].T,
                        lambda x: x.T[:, :, None, None]),
    'batched': Layout(lambda s: (1, *s), lambda x: x[0], lambda x: x[None]),  # [1, ...], [...]
}


@dataclasses.dataclass(frozen=True)
class TensorMatch:
  """A variable, and its tensors in the file.

  Attributes:
    entry: its entry in the family's table.
    struct: jax.ShapeDtypeStruct of the variable.
    names: names of the tensors: one, or one per layer.
    note: a line on a tensor that has to be resized, or ''.
  """

  entry: Entry
  struct: jax.ShapeDtypeStruct
  names: tuple[str, ...]
  note: str

  def read(self, tensors: Mapping) -> np.ndarray:
    """The variable's value from the tensors, in the variable's dtype."""
    stacked = '{}' in self.entry.name
    shape = self.struct.shape[1:] if stacked else self.struct.shape
    layout, (number, count) = LAYOUTS[self.entry.layout], self.entry.part
    value = np.empty(self.struct.shape, self.struct.dtype)
    for name, target in zip(self.names, value if stacked else [value]):
      array = np.asarray(tensors[name])
      if count > 1:
        array = np.split(array, count, axis=layout.output_axis)[number]
      array = layout.to_flax(array)
      # Also if the shapes are equal: tables of 4 x 4 and 2 x 8 grids have the same shape.
      target[...] = self.entry.fit(array, shape) if self.entry.fit else array
    return value


def match_variables(file_shapes: Mapping[str, tuple], entries: Iterable[Entry],
                    shapes) -> dict[str, TensorMatch]:
  """Matches the tensors of a checkpoint to a model's variables, without reading them.

  Args:
    file_shapes: name -> shape of each tensor.
    entries: the family's table; it may have more entries than there are variables.
    shapes: pytree of jax.ShapeDtypeStruct, as from the model's init.

  Returns:
    A TensorMatch for the path of each variable.

  Raises:
    UserError: a tensor is missing or has another shape.
  """
  table = {entry.path: entry for entry in entries}
  return {path: _match(file_shapes, table[path], struct)
          for path, struct in traverse_util.flatten_dict(shapes, sep='/').items()}


def _match(file_shapes, entry, struct):
  stacked = '{}' in entry.name
  shape = struct.shape[1:] if stacked else struct.shape
  layout = LAYOUTS[entry.layout]
  wanted = list(layout.file_shape(shape))
  if entry.part[1] > 1:
    wanted[layout.output_axis] *= entry.part[1]
  names = tuple(entry.name.format(i) for i in range(struct.shape[0] if stacked else 1))
  note = ''
  for name in names:
    if name not in file_shapes:
      raise UserError(f'no tensor {name}, wanted {wanted} for {entry.path}; is the '
                      'file complete, and does config.json belong to it?')
    found = list(file_shapes[name])
    if found != wanted:
      if entry.fit is None or len(found) != len(wanted):
        raise UserError(f'tensor {name} is {found}, wanted {wanted} for {entry.path}; '
                        'does config.json belong to it?')
      note = f'{name} {found} in the file, made {wanted}'
  return TensorMatch(entry, struct, names, note)


def read_variables(tensors: Mapping, entries: Iterable[Entry], shapes):
  """Reads a model's variables from the tensors of a checkpoint: pytree of numpy arrays as `shapes`.

  Arguments and errors as in `match_variables`, except tensors: name -> array.
  """
  matches = match_variables({name: x.shape for name, x in tensors.items()}, entries, shapes)
  return traverse_util.unflatten_dict(
      {path: match.read(tensors) for path, match in matches.items()}, sep='/')


def write_tensors(variables, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
  """Converts a model's variables to the tensors of a checkpoint: the inverse of `read_variables`.

  Args:
    variables: pytree of arrays.
    entries: the family's table; entries without a variable are skipped.
  """
  flat = traverse_util.flatten_dict(variables, sep='/')
  tensors, parts = {}, {}
  for entry in entries:
    if entry.path not in flat:
      continue
    value = np.asarray(jax.device_get(flat[entry.path]))
    layout = LAYOUTS[entry.layout]
    for layer, array in enumerate(value if '{}' in entry.name else [value]):
      name = entry.name.format(layer)
      array = np.ascontiguousarray(layout.to_file(array))
      if entry.part[1] == 1:
        tensors[name] = array
      else:
        of_name = parts.setdefault(name, [None] * entry.part[1])
        of_name[entry.part[0]] = array
        if all(x is not None for x in of_name):
          tensors[name] = np.concatenate(of_name, axis=layout.output_axis)
  return tensors


def grow_rows(array, shape):
  """Appends rows to a table; the new rows are the mean of the others.

  They are for tokens that the checkpoint lacks (a pad token for GPT-2); the mean
  is close to no particular word.

  Raises:
    UserError: the table would shrink, or its width differs.
  """
  if array.shape[1:] != tuple(shape[1:]) or shape[0] < array.shape[0]:
    raise UserError(f'a table of {list(array.shape)} cannot be made {list(shape)}; does '
                    'config.json belong to it?')
  more = np.broadcast_to(array.mean(0, dtype=np.float32), (shape[0] - array.shape[0], shape[1]))
  return np.concatenate([array.astype(np.float32), more])


def init_shapes(module, *inputs, **kwargs):
  """Shapes of the variables of module.init for these inputs, without computing them."""
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))


def require(config: Mapping, key, wanted):
  """Raises UserError unless config[key] is missing or one of `wanted`."""
  if key in config and config[key] not in wanted:
    raise UserError(f'checkpoint config.json: {key} is {config[key]!r}, only '
                    f'{" or ".join(map(repr, wanted))} can be read; choose another checkpoint')
