"""The devices that a program is compiled for: those of this machine, or of one that is not here."""

from collections.abc import Iterator, Sequence
import contextlib

import jax

_elsewhere: list[Sequence[jax.Device]] = []


def devices() -> Sequence[jax.Device]:
  """All devices of the target."""
  return _elsewhere[-1] if _elsewhere else jax.devices()


def platform() -> str:
  """'cpu', 'gpu' or 'tpu'."""
  return _elsewhere[-1][0].platform if _elsewhere else jax.default_backend()


@contextlib.contextmanager
def compiling_for(others: Sequence[jax.Device]) -> Iterator[None]:
  """Within it, the target is `others`, devices of a topology: see cost.topology."""
  _elsewhere.append(others)
  try:
    yield
  finally:
    _elsewhere.pop()
