"""Low-rank adapters (LoRA, arXiv:2106.09685): y = x W + (x A) B * alpha / rank, W frozen.

Adapters are parameters of the layer whose kernel they change: `query/kernel` [in, out] gets
`query/lora_a` [in, rank] and `query/lora_b` [rank, out] beside it (a convolution's `lora_a` is
[height, width, in, rank]), under the scan over layers with their leading axis [L, ...].

Why not Google's qwix, which has adapters for Linen: version 0.1.8 finds its layers by their path,
and a tower that is unbound and applied by itself, as cached decoding does, has another one: the
adapters are left out there without a word. It also drops out in evaluation, and patches the
functions of JAX for the whole process. Why not adapters merged into the kernels at each step: the
gradient of a whole kernel would be computed and kept, which is what LoRA is there to save.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import functools
import re

from flax import linen as nn
from flax import traverse_util
from flax.core import meta
import jax.numpy as jnp

from xmodal.errors import UserError
from xmodal.options import ABOVE_ZERO, Option

OPTIONS = {
    'pattern': Option('', "Regular expression of the paths of kernels that get adapters, such as "
                      "'text_tower/.*/(query|value)/kernel'; the rest of their towers is frozen.",
                      is_pattern=True),
    'rank': Option(8, 'Of the adapters.', low=1),
    'alpha': Option(16.0, 'Over the rank: scale of the adapters.', low=ABOVE_ZERO),
    'dropout_rate': Option(0.0, "Of the adapters' inputs.", low=0, high=0.99)}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which kernels get adapters, and what kind; as config.model.lora.

  Attributes:
    pattern: regular expression searched in the paths of kernels; '' for no adapters.
    rank: width between A and B.
    alpha: B's output is multiplied by alpha / rank.
    dropout_rate: of A's input, in training.
  """

  pattern: str = ''
  rank: int = 8
  alpha: float = 16.0
  dropout_rate: float = 0.0


def adapters(lora: Lora, *, deterministic: bool):
  """A context in which layers have adapters: model.init makes them, model.apply uses them."""
  if not lora.pattern:
    return contextlib.nullcontext()
  return nn.intercept_methods(functools.partial(_adapt, lora, deterministic))


def _adapt(lora, deterministic, layer_method, args, kwargs, context):
  y, layer = layer_method(*args, **kwargs), context.module
  if not isinstance(layer, (nn.Dense, nn.Conv)) or context.method_name != '__call__':
    return y
  # An unbound tower does not know its whole path, but what adapters it has.
  if not (re.search(lora.pattern, '/'.join((*layer.path, 'kernel'))) if layer.is_initializing()
          else layer.has_variable('params', 'lora_a')):
    return y
  kernel = meta.unbox(layer.get_variable('params', 'kernel'))  # see sharding.gather
  # Not layer.param: in a scan, its random numbers would be taken from the kernel's.
  a = layer.variable('params', 'lora_a', lambda: _first_a(
      layer.scope.rngs['params'].as_jax_rng(), (*kernel.shape[:-1], lora.rank))).value
  # B is zero: the model begins as it was.
  b = layer.variable('params', 'lora_b', jnp.zeros, (lora.rank, kernel.shape[-1])).value
  x = nn.Dropout(lora.dropout_rate, name='lora_dropout')(args[0], deterministic=deterministic)
  # The same layer with A for its kernel, whether it multiplies or convolves.
  narrow = layer.clone(features=lora.rank, use_bias=False, name=None)
  x = narrow.apply({'params': {'kernel': a}}, x) * (lora.alpha / lora.rank)
  return y + x @ b.astype(x.dtype)


# As peft and the paper's code have it.
_first_a = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def is_adapter(name: str) -> bool:
  """Whether a parameter's path is that of an adapter."""
  return name.rpartition('/')[2] in ('lora_a', 'lora_b')


def frozen_by_adapters(names: Iterable[str]) -> set[str]:
  """Paths of parameters that adapters freeze: their kernels, and the rest of their towers."""
  names = list(names)
  adapted = {name.rpartition('/')[0] for name in names if is_adapter(name)}
  towers = tuple({found[0] for name in adapted
                  if (found := re.match(r'backbone/\w+_tower/', name))})
  return {name for name in names if not is_adapter(name)
          and (name.startswith(towers) or name.removesuffix('/kernel') in adapted)}


def check(lora: Lora, params) -> None:
  """Raises UserError if parameters (or their shapes) have no adapters and should have."""
  names = list(traverse_util.flatten_dict(params, sep='/'))
  if lora.pattern and not any(map(is_adapter, names)):
    kernels = [name for name in names if name.endswith('/kernel')]
    some = ', '.join(kernels[::len(kernels) // 5 + 1])
    raise UserError(f'config.model.lora.pattern={lora.pattern!r} matches no kernel; wanted a '
                    f'regular expression found in paths such as {some}')


def merge(params, lora: Lora):
  """Parameters without adapters whose model gives the same outputs: kernel + A B * alpha / rank.

  Args:
    params: of a model or of a part of it, float32, as nested dicts.
    lora: the Lora, or config.model.lora, that they were trained with.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  merged = {name: value for name, value in flat.items() if not is_adapter(name)}
  for name in flat:
    if name.endswith('/lora_a'):
      layer = name.removesuffix('/lora_a')
      a, b = flat[name], flat[f'{layer}/lora_b']
      # A scan's axis goes in front; a convolution's sides are A's alone.
      b = b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])
      merged[f'{layer}/kernel'] += (lora.alpha / lora.rank) * jnp.matmul(a, b, precision='highest')
  return traverse_util.unflatten_dict(merged, sep='/')
