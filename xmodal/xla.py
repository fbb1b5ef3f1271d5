"""Settings of XLA without which some versions compute wrong results."""

from collections.abc import MutableMapping
from importlib import metadata

_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
# From the first version to before the second, fused sums of more than 32,768 rows
# may be wrong on a CPU (jax issue 39103), and fused products may crash.
_WRONG = ((0, 10), (0, 12))
# From the first version to before the second, these fusions round a row by the number of rows
# beside it. Later versions may not know the flag.
_UNEQUAL = ((0, 12), (0, 13))
# Of those fusions, one that is right, and without which products of integers take 50 times as long.
_INTEGERS = {_FLAG.removeprefix('--'): 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}
_NONE = {_FLAG.removeprefix('--'): ''}


def avoid_wrong_sums(environment: MutableMapping[str, str]) -> None:
  """Turns the faulty fusions off in XLA_FLAGS, unless XLA_FLAGS sets them.

  Has an effect until JAX first uses a device.
  """
  flags = environment.get('XLA_FLAGS', '')
  if _is_in(_WRONG) and _FLAG not in flags:
    environment['XLA_FLAGS'] = f'{flags} {_FLAG}='.strip()


def prediction_options(platform: str, integers: bool) -> dict[str, str]:
  """compiler_options of jax.jit for predictions, whose bits must not depend on their batch.

  integers: whether the program has products of integers.
  """
  if platform != 'cpu':
    return {}
  if integers:
    return _INTEGERS if _is_in(_WRONG) else {}
  return _NONE if _is_in(_UNEQUAL) else {}


def _is_in(versions):
  try:
    version = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
  except (metadata.PackageNotFoundError, ValueError):
    return False
  return versions[0] <= version < versions[1]
