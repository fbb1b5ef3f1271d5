"""Low-rank adapters (LoRA, arXiv:2106.09685): y = x W + (x A) B * alpha / rank, W frozen.

Adapters are parameters of the layer whose kernel they change: `query/kernel` [in, out] gets
`query/lora_a` [in, rank] and `query/lora_b` [rank, out] beside it (a convolution's `lora_a` is
[height, width, in, rank]), under the scan over layers with their leading axis [L, ...].

Google's qwix also has adapters for Linen, but version 0.1.8 finds layers by their path, which
changes when a tower is unbound and applied alone, as in cached decoding; the adapters are then
silently ignored. It also applies dropout in evaluation, and patches JAX functions for the whole
process. Merging adapters into the kernels at each step would compute and keep the gradient of each
whole kernel, a cost that LoRA avoids.
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
                      "'text_tower/.*/(query|value)/kernel'; freezes the rest of their towers.",
                      is_pattern=True),
    'rank': Option(8, 'Rank of the adapters.', low=1),
    'alpha': Option(16.0, 'The adapters are scaled by alpha / rank.', low=ABOVE_ZERO),
    'dropout_rate': Option(0.0, "Dropout on the adapters' inputs.", low=0, high=0.99)}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adapters of a model; the fields of config.model.lora.

  Attributes:
    pattern: regular expression searched in the paths of kernels; '' for no adapters.
    rank: rank of the adapters.
    alpha: the adapters' outputs are multiplied by alpha / rank.
    dropout_rate: dropout on A's input, in training.
  """

  pattern: str = ''
  rank: int = 8
  alpha: float = 16.0
  dropout_rate: float = 0.0


def adapters(lora: Lora, *, deterministic: bool):
  """A context in which layers have adapters: model.init creates them, model.apply uses them."""
  if not lora.pattern:
    return contextlib.nullcontext()
  return nn.intercept_methods(functools.partial(_adapt, lora, deterministic))


def _adapt(lora, deterministic, layer_method, args, kwargs, context):
  y, layer = layer_method(*args, **kwargs), context.module
  if not isinstance(layer, (nn.Dense, nn.Conv)) or context.method_name != '__call__':
    return y
  # An unbound tower does not know its full path, but its parameters show which adapters exist.
  if not (re.search(lora.pattern, '/'.join((*layer.path, 'kernel'))) if layer.is_initializing()
          else layer.has_variable('params', 'lora_a')):
    return y
  kernel = meta.unbox(layer.get_variable('params', 'kernel'))  # see sharding.gather
  # Not layer.param: in a scan, it would take its random numbers from the kernel's.
  a = layer.variable('params', 'lora_a', lambda: _first_a(
      layer.scope.rngs['params'].as_jax_rng(), (*kernel.shape[:-1], lora.rank))).value
  # B is zero: the adapters start without effect.
  b = layer.variable('params', 'lora_b', jnp.zeros, (lora.rank, kernel.shape[-1])).value
  x = nn.Dropout(lora.dropout_rate, name='lora_dropout')(args[0], deterministic=deterministic)
  # The same kind of layer (dense or convolution) with kernel A.
  narrow = layer.clone(features=lora.rank, use_bias=False, name=None)
  x = narrow.apply({'params': {'kernel': a}}, x) * (lora.alpha / lora.rank)
  return y + x @ b.astype(x.dtype)


# As in peft and the paper's code.
_first_a = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def is_adapter(name: str) -> bool:
  """Whether a parameter's path belongs to an adapter."""
  return name.rpartition('/')[2] in ('lora_a', 'lora_b')


def frozen_by_adapters(names: Iterable[str]) -> set[str]:
  """Paths of parameters that adapters freeze: their kernels and the rest of their towers."""
  names = list(names)
  adapted = {name.rpartition('/')[0] for name in names if is_adapter(name)}
  towers = tuple({found[0] for name in adapted
                  if (found := re.match(r'backbone/\w+_tower/', name))})
  return {name for name in names if not is_adapter(name)
          and (name.startswith(towers) or name.removesuffix('/kernel') in adapted)}


def check(lora: Lora, params) -> None:
  """Raises UserError if the pattern matches no kernel of parameters (or their shapes)."""
  names = list(traverse_util.flatten_dict(params, sep='/'))
  if lora.pattern and not any(map(is_adapter, names)):
    kernels = [name for name in names if name.endswith('/kernel')]
    some = ', '.join(kernels[::len(kernels) // 5 + 1])
    raise UserError(f'config.model.lora.pattern={lora.pattern!r} matches no kernel; wanted a '
                    f'regular expression found in paths such as {some}')


def merge(params, lora: Lora):
  """Merges adapters into the kernels, with equal outputs: kernel + A B * alpha / rank.

  Args:
    params: parameters of a model or a part of it, float32, as nested dicts.
    lora: the Lora, or config.model.lora, used in training.

  Returns:
    The parameters, without adapters.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  merged = {name: value for name, value in flat.items() if not is_adapter(name)}
  for name in flat:
    if name.endswith('/lora_a'):
      layer = name.removesuffix('/lora_a')
      a, b = flat[name], flat[f'{layer}/lora_b']
      # A scan's axis comes first; only A has a convolution's sides.
      b = b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])
      merged[f'{layer}/kernel'] += (lora.alpha / lora.rank) * jnp.matmul(a, b, precision='highest')
  return traverse_util.unflatten_dict(merged, sep='/')
