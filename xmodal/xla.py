"""Settings of XLA without which some versions compute wrong results."""

from collections.abc import MutableMapping
from importlib import metadata

_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
# From the first version to before the second, fused sums of more than 32,768 rows
# may be wrong on a CPU (jax issue 39103), and fused products may crash.
_WRONG = ((0, 10), (0, 12))


def avoid_wrong_sums(environment: MutableMapping[str, str]) -> None:
  """Turns the faulty fusions off in XLA_FLAGS, unless they say something of them already.

  Has an effect until JAX first uses a device.
  """
  try:
    version = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
  except (metadata.PackageNotFoundError, ValueError):
    return
  flags = environment.get('XLA_FLAGS', '')
  if _WRONG[0] <= version < _WRONG[1] and _FLAG not in flags:
    environment['XLA_FLAGS'] = f'{flags} {_FLAG}='.strip()
