"""Captures intermediate arrays of layers by name: attention weights, tokens.

    output, arrays = capture(model, variables, batch, method='predict', names='attention/weights')

Layers offer arrays, which are computed only if captured: a training step or a prediction without
captures compiles to the same program as without offers.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax

COLLECTION = 'captured'


def offer(module: nn.Module, name: str, make: Callable[[], Any]) -> None:
  """Offers arrays of a layer under a name; `make` is called only if they are captured."""
  if module.is_mutable_collection(COLLECTION) and not module.is_initializing():
    module.sow(COLLECTION, name, make())


def capture(model: nn.Module, variables: Mapping, *args: Any, names: str = '', **kwargs: Any
            ) -> tuple[Any, dict[str, jax.Array]]:
  """Applies a model and captures arrays that its layers offer.

  Args:
    model, variables, *args, **kwargs: as model.apply takes them.
    names: regular expression searched in the paths of the arrays; '': captures all. Under
      jax.jit, other arrays are not computed.

  Returns:
    The output, and the arrays by path: '.../attention/weights' is float32 [B, H, Q, K],
    '.../tokens' [B, N, D], the output of a layer. Layers of a scan have a leading axis [L, ...].
    If a layer is called several times, or offers several arrays, the path ends in their index.
  """
  output, state = model.apply(variables, *args, mutable=[COLLECTION], **kwargs)
  return output, found(state, names)


def found(state: Mapping, names: str = '') -> dict[str, jax.Array]:
  """The arrays in the state that model.apply returned with mutable=[COLLECTION], see capture."""
  arrays_by_path = {}
  for path, calls in traverse_util.flatten_dict(state.get(COLLECTION, {}), sep='/').items():
    # Flax keeps a tuple with one entry per call.
    for number, call in enumerate(calls):
      arrays = jax.tree.leaves(call)
      for i, array in enumerate(arrays):
        numbers = [str(number)] * (len(calls) > 1) + [str(i)] * (len(arrays) > 1)
        arrays_by_path['/'.join([path, *numbers])] = array
  return {path: x for path, x in arrays_by_path.items() if re.search(names, path)}
