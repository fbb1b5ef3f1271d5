"""One table a model family: which tensors of a file make which parameter."""

from collections.abc import Mapping
import dataclasses
import math
import re

from flax import traverse_util
import jax
import numpy as np

from xmodal.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
  """One variable and the tensors it is made of.

  Attributes:
    path: of the variable, 'params/layers/mlp/up/kernel'.
    name: of the tensor. '{}' stands for the layer: the variable is then the
      stack [L, ...] of a tensor for each.
    layout: a key of LAYOUTS.
  """

  path: str
  name: str
  layout: str = 'same'


def linear(path, name):
  """The entries of a linear layer with a bias."""
  return [Entry(f'{path}/kernel', f'{name}.weight', 'linear'),
          Entry(f'{path}/bias', f'{name}.bias')]


def norm(path, name):
  """The entries of a norm with a bias."""
  return [Entry(f'{path}/scale', f'{name}.weight'), Entry(f'{path}/bias', f'{name}.bias')]


def _patch_file_shape(shape):
  side = math.isqrt(shape[0] // 3)
  return shape[1], 3, side, side


# Layout: the file's shape for a shape of ours, and the file's array in our order of axes.
LAYOUTS = {
    'same': (lambda s: s, lambda x: x),
    'linear': (lambda s: (s[1], s[0]), np.transpose),  # [out, in] -> [in, out]
    'conv': (lambda s: (s[3], s[2], s[0], s[1]), lambda x: x.transpose(2, 3, 1, 0)),
    'patch': (_patch_file_shape,  # A convolution [D, 3, P, P] -> [P * P * 3, D].
              lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])),
    'batched': (lambda s: (1, *s), lambda x: x[0]),  # [1, ...] -> [...]
}


def variables_from_tensors(tensors, entries, shapes, *, prefix, ignore):
  """Reads a model's variables out of the tensors of a checkpoint.

  Args:
    tensors: mapping of name to array; each array is asked for once.
    entries: the family's table; one Entry for each variable in shapes.
    shapes: pytree of jax.ShapeDtypeStruct, what the model's init would give.
    prefix: what some files put before every name ('vit.'); taken off.
    ignore: regex of names (without the prefix) that are no part of the model.

  Returns:
    Pytree like shapes of numpy arrays.

  Raises:
    UserError: a tensor is missing, has another shape, or is not known.
  """
  names = {name.removeprefix(prefix): name for name in tensors}
  shapes = traverse_util.flatten_dict(shapes, sep='/')
  variables, used = {}, set()
  for entry in entries:
    struct = shapes[entry.path]
    file_shape, to_flax = LAYOUTS[entry.layout]
    stacked = '{}' in entry.name
    shape = struct.shape[1:] if stacked else struct.shape
    arrays = []
    for layer in range(struct.shape[0] if stacked else 1):
      name = entry.name.format(layer)
      if name not in names:
        raise UserError(f'checkpoint: no tensor {prefix}{name} or {name}, wanted '
                        f'{file_shape(shape)} for {entry.path}; is it of the same model family '
                        'and size as its config.json?')
      array = np.asarray(tensors[names[name]])
      if array.shape != file_shape(shape):
        raise UserError(f'checkpoint: tensor {names[name]} is {array.shape}, wanted '
                        f'{file_shape(shape)} for {entry.path}; does config.json belong to it?')
      arrays.append(to_flax(array).astype(struct.dtype))
      used.add(name)
    variables[entry.path] = np.stack(arrays) if stacked else np.ascontiguousarray(arrays[0])
  extra = sorted(names[n] for n in names if n not in used and not re.fullmatch(ignore, n))
  if extra:
    raise UserError(f'checkpoint: {len(extra)} tensors have no place in the model, the first is '
                    f'{extra[0]}; does config.json belong to it?')
  assert variables.keys() == shapes.keys(), shapes.keys() ^ variables.keys()
  return traverse_util.unflatten_dict(variables, sep='/')


def init_shapes(module, *inputs, **kwargs):
  """Shapes of the variables module.init makes for these inputs; computes nothing."""
  return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))


def require(config: Mapping, key, wanted):
  """Raises UserError unless config[key] is absent or one of wanted."""
  if key in config and config[key] not in wanted:
    raise UserError(f'checkpoint config.json: {key} is {config[key]!r}, only '
                    f'{" or ".join(map(repr, wanted))} can be read; choose another checkpoint')
