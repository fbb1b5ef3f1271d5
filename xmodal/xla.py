"""Settings of XLA without which some versions compute wrong results or end a slow program."""

from collections.abc import MutableMapping
from importlib import metadata

# (flag, value, first version, first version without it): XLA ends at flags that it does not know.
_FLAGS = (
    # Fused sums of more than 32,768 rows may be wrong on a CPU (jax issue 39103), and fused
    # products may crash.
    ('--xla_cpu_experimental_ynn_fusion_type', '', (0, 10), (0, 12)),
    # A device of a CPU that waits longer for another ends the process, by default after 40 s. On a
    # loaded machine it may take longer.
    ('--xla_cpu_collective_call_terminate_timeout_seconds', '600', (0, 10), (0, 13)))


def set_flags(environment: MutableMapping[str, str]) -> None:
  """Adds these settings to XLA_FLAGS, unless it has them already.

  Has an effect until JAX first uses a device.
  """
  try:
    version = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
  except (metadata.PackageNotFoundError, ValueError):
    return
  for flag, value, first, end in _FLAGS:
    flags = environment.get('XLA_FLAGS', '')
    if first <= version < end and flag not in flags:
      environment['XLA_FLAGS'] = f'{flags} {flag}={value}'.strip()
