"""Takes attention heads, MLP units and whole layers out of a model's stacks of layers.

The importance of a unit is |dL/dg| for a factor g = 1 on its output: the first-order change of the
loss without it (arXiv:1611.06440, 1905.10650). It needs no extra backward pass, as it is the sum of
w * dL/dw over the unit's rows of the kernel that reads it.

All modules of a slot keep equally many units, as one option gives their number; each keeps its own
best. Where layers share a bias for each head (T5), they keep the same heads.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

Flat = Mapping[str, jax.Array]  # parameters by path
_HEADS, _UNITS = 'out/kernel', 'down/kernel'  # the kernel that reads heads, or units


@dataclasses.dataclass(frozen=True)
class Module:
  """An attention or an MLP in a stack of L layers.

  Attributes:
    path: of its parameters.
    stack: path of the layers that it is in.
    slot: the part of the model whose options give its sizes, such as 'vision'.
    has_heads: whether it is an attention.
    units: heads, or width of the MLP.
  """

  path: str
  stack: str
  slot: str
  has_heads: bool
  units: int


def find_modules(params: Flat, slots: Mapping[str, str], num_heads: Mapping[str, int]
                 ) -> list[Module]:
  """The modules that can be pruned.

  Args:
    params: all parameters, or their shapes.
    slots: by slot, how the paths of its parameters begin.
    num_heads: attention heads by slot.
  """
  found = []
  for path, x in params.items():
    for slot, begin in slots.items():
      if match := re.match(rf'({begin}\w*layers)/.*?({_HEADS}|{_UNITS})$', path):
        module = path.removesuffix(f'/{match[2]}')
        has_heads = match[2] == _HEADS and f'{module}/query/kernel' in params
        if has_heads or f'{module}/up/kernel' in params:
          units = num_heads[slot] if has_heads else x.shape[-2]
          found.append(Module(module, match[1], slot, has_heads, units))
  return found


def importances(params: Flat, gradients: Flat, modules: list[Module]
                ) -> dict[str, Float[Array, 'L units']]:
  """Importance of the units of each module, by its path: float32 [L, units]."""
  found = {}
  for module in modules:
    name = f'{module.path}/{_HEADS if module.has_heads else _UNITS}'
    product = params[name] * gradients[name]
    found[module.path] = jnp.abs(product.reshape(len(product), module.units, -1).sum(-1))
  return found


@dataclasses.dataclass(frozen=True)
class Cut:
  """What stays.

  Attributes:
    layers: by stack, indices of its layers.
    units: by path of a module, indices of its units in each of those layers, int [K, units].
  """

  layers: Mapping[str, np.ndarray]
  units: Mapping[str, np.ndarray]


def choose(importance: Mapping[str, np.ndarray], modules: list[Module], params: Flat, *,
           heads: float, width: float, layers: float = 1.0) -> Cut:
  """Chooses the most important units and layers.

  Args:
    importance: see importances.
    modules: see find_modules.
    params: all parameters, or their shapes.
    heads, width, layers: shares that stay of each attention's heads, of each MLP's width and of
      each stack's layers; at least one of them.
  """
  of_stack = {}
  for module in modules:
    of_stack[module.stack] = of_stack.get(module.stack, 0) + importance[module.path].sum(-1)
  kept = {stack: _best(total[None], layers)[0] for stack, total in of_stack.items()}
  units = {}
  for module in modules:
    scores = importance[module.path][kept[module.stack]]
    if module.has_heads and _bias(module) in params:
      scores = np.broadcast_to(scores.sum(0), scores.shape)
    units[module.path] = _best(scores, heads if module.has_heads else width)
  return Cut(kept, units)


def _best(scores, share):
  """Indices of the highest of each row, in ascending order."""
  number = max(1, round(share * scores.shape[-1]))
  return np.sort(np.argsort(-scores, axis=-1, kind='stable')[..., :number], axis=-1)


def _bias(module):
  """Path of the bias that the layers of a stack share."""
  self_attention = module.path == f'{module.stack}/attention'
  return f'{module.stack.removesuffix("layers")}relative_bias/embedding' if self_attention else ''


def cut(params: Flat, modules: list[Module], chosen: Cut) -> dict[str, jax.Array]:
  """The parameters that stay, by path."""
  found = dict(params)
  for stack, layers in chosen.layers.items():
    found |= {path: x[layers] for path, x in params.items() if path.startswith(f'{stack}/')}
  for module in modules:
    units = chosen.units[module.path]
    for path, axis in _axes(module):
      if path in found:
        found[path] = _take(found[path], axis, module.units, units)
    if module.has_heads and _bias(module) in found:
      found[_bias(module)] = found[_bias(module)][:, units[0]]
  return found


def _axes(module) -> Iterator[tuple[str, int]]:
  """Paths of a module's parameters with the axis of its units."""
  makers, reader = (('query', 'key', 'value'), 'out') if module.has_heads else (
      ('up', 'gate'), 'down')
  for maker in makers:
    yield f'{module.path}/{maker}/kernel', -1
    yield f'{module.path}/{maker}/bias', -1
  yield f'{module.path}/{reader}/kernel', -2


def _take(x, axis, units, indices):
  """Some units of an axis, other ones in each layer: [L, ..., units * W, ...]."""
  axis %= x.ndim
  parts = x.reshape(*x.shape[:axis], units, -1, *x.shape[axis + 1:])
  shape = [1] * parts.ndim
  shape[0], shape[axis] = indices.shape
  parts = jnp.take_along_axis(parts, jnp.asarray(indices).reshape(shape), axis)
  return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])
