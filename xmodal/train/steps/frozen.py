"""Frozen parameters: selects them, and splits a tree into trained and frozen parameters.

Only trained parameters have gradients and optimizer state; frozen ones cost a forward pass.
"""

from collections.abc import Set
import re

from flax import traverse_util

from xmodal.errors import UserError
from xmodal.models.lora import frozen_by_adapters, is_adapter


def frozen_names(pattern: str, params) -> frozenset[str]:
  """Paths of the parameters that never change.

  Args:
    pattern: config.optimizer.frozen, a regular expression searched in paths; '' for none.
    params: all parameters, or their shapes. Towers with adapters are frozen except for these.

  Raises:
    UserError: the pattern matches no parameter or an adapter, or nothing is left to train.
  """
  names = set(traverse_util.flatten_dict(params, sep='/'))
  found = {name for name in names if re.search(pattern, name)} if pattern else set()
  if pattern and not found:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in names})
    raise UserError(f'config.optimizer.frozen={pattern!r} matches no parameter; wanted a regular '
                    f'expression that matches paths, which begin with {", ".join(parts)}')
  if adapters := sorted(filter(is_adapter, found)):
    raise UserError(f'config.optimizer.frozen={pattern!r} matches the adapter {adapters[0]}; '
                    'towers with adapters are frozen except for these; exclude them')
  frozen = frozenset(found | frozen_by_adapters(names))
  if frozen == names:
    raise UserError(f'config.optimizer.frozen={pattern!r} leaves no parameter to train; wanted a '
                    "narrower regular expression, such as 'vision_tower'")
  return frozen


def split(params, frozen: Set[str]):
  """Splits parameters into (trained, frozen), both nested dicts."""
  flat = traverse_util.flatten_dict(params, sep='/')
  return tuple(traverse_util.unflatten_dict(
      {name: x for name, x in flat.items() if (name in frozen) == is_frozen}, sep='/')
               for is_frozen in (False, True))


def join(trained, frozen):
  """Joins the results of `split`."""
  return traverse_util.unflatten_dict(
      {**traverse_util.flatten_dict(trained), **traverse_util.flatten_dict(frozen)})
