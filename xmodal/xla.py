"""Settings of XLA without which some versions compute wrong results."""

from collections.abc import MutableMapping
from importlib import metadata

_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
# From the first version to before the second. On a CPU, with 0.10 and 0.11 fused sums of more than
# 32,768 rows may be wrong (jax issue 39103), and fused products may crash; with 0.12 convolutions
# in 16 bits gave NaN, and rounding of a row depended on the rows beside it. Later versions may not
# know the flag.
_WRONG = ((0, 10), (0, 13))
# Of those fusions, one that is right, and without which products of integers take 50 times as long.
_INTEGERS = {_FLAG.removeprefix('--'): 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}


def avoid_wrong_sums(environment: MutableMapping[str, str]) -> None:
  """Turns the faulty fusions off in XLA_FLAGS, unless XLA_FLAGS sets them.

  Has an effect until JAX first uses a device.
  """
  flags = environment.get('XLA_FLAGS', '')
  if _is_faulty() and _FLAG not in flags:
    environment['XLA_FLAGS'] = f'{flags} {_FLAG}='.strip()


def integer_options(platform: str) -> dict[str, str]:
  """compiler_options of jax.jit for a program with products of integers."""
  return _INTEGERS if platform == 'cpu' and _is_faulty() else {}


def _is_faulty():
  try:
    version = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
  except (metadata.PackageNotFoundError, ValueError):
    return False
  return _WRONG[0] <= version < _WRONG[1]
