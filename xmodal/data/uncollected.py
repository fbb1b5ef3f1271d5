"""Pauses the search for cycles of objects, where millions without any are made."""

from collections.abc import Iterator
import contextlib
import gc


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
  """Context manager or decorator: disables Python's cyclic garbage collector, whose full
  collections take about 10% of the time while millions of objects are made."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()
