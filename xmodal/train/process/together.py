"""Decisions that all processes of a run take together.

A process that failed or stopped alone would leave the others waiting at a barrier forever.
"""

import base64
from collections.abc import Callable
import pickle
import socket
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from xmodal.errors import UserError
from xmodal.sharding import hosts

_BYTES = 2048  # maximum length of an exchanged text
# Bytes of larger objects that the devices exchange at once: each holds those of all processes.
_AT_ONCE = 1 << 26


def gather(text: str) -> list[str]:
  """Gathers a text from every process, in process order; every process must call it."""
  if jax.process_count() == 1:
    return [text]
  row = np.zeros(_BYTES, np.uint8)
  data = text.encode('utf-8', 'backslashreplace')[:_BYTES]
  row[:len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [bytes(row).rstrip(b'\0').decode('utf-8', 'ignore') for row in np.asarray(rows)]


def agree(action: Callable[[], str], *, lead: bool = False) -> str:
  """Runs an action on every process, or on the first only; raises on all if it fails on one.

  Args:
    action: returns a text.
    lead: whether only process 0 runs it.

  Returns:
    The action's result on process 0.

  Raises:
    UserError: the action raised one on some process.
    Exception: any other exception of this process; the others raise a UserError about it.
  """
  error, said = None, ''
  try:
    if not lead or jax.process_index() == 0:
      said = f'={action()}'
  except Exception as raised:  # raised below, after the others know
    error = raised
    said = _reason(raised)
  answers = gather(said)
  if error is not None and not isinstance(error, UserError):
    raise error
  for kind in '!?':
    for number, answer in enumerate(answers):
      if answer.startswith(kind):
        raise _of_another(number, answer) from error
  return answers[0][1:]


def from_lead(make: Callable[[], str]) -> str:
  """The ASCII text that process 0 makes, on every process.

  The others wait without a collective, however long it takes.

  Raises:
    UserError: making it raised one.
    Exception: on process 0, any other exception; the others raise a UserError about it.
  """
  if not hosts.several():
    return make()
  error, said = None, ''
  if jax.process_index() == 0:
    try:
      said = f'={make()}'
    except Exception as raised:  # raised below, after the others know
      error, said = raised, _reason(raised)
  said = hosts.from_first(said)
  if error is not None:
    raise error
  if not said.startswith('='):
    raise _of_another(0, said)
  return said[1:]


def to_lead(value: Any) -> list[Any] | None:
  """Every process's value, in process order, on process 0, and None on the others.

  Every process must call it. The values are pickled.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = [int(size) for size in gather(str(data.size))]
  received = [bytearray() for _ in sizes]
  most = max(1, _AT_ONCE // len(sizes))
  for start in range(0, max(sizes), most):
    piece = data[start:start + most]
    length = min(most, max(sizes) - start)
    rows = multihost_utils.process_allgather(np.pad(piece, (0, length - piece.size)))
    if jax.process_index() == 0:
      for whole, row, size in zip(received, rows, sizes):
        whole += row[:max(0, size - start)].tobytes()
  return list(map(pickle.loads, received)) if jax.process_index() == 0 else None


def result_of_lead(make: Callable[[], Any]) -> Any:
  """What `make` returns on process 0, pickled to every process; see from_lead."""
  if not hosts.several():
    return make()
  text = from_lead(lambda: base64.b64encode(pickle.dumps(make())).decode('ascii'))
  return pickle.loads(base64.b64decode(text))


def _reason(raised):
  return f'!{raised}' if isinstance(raised, UserError) else f'?{type(raised).__name__}: {raised}'


def _of_another(number, reason):
  """The error of this process for that of another, as _reason gives it."""
  return UserError(reason[1:] if reason[0] == '!' else f'process {number} failed ({reason[1:]})')


def here() -> str:
  """This process in words: its machine, and its index if there are several."""
  name = socket.gethostname()
  return name if jax.process_count() == 1 else f'process {jax.process_index()} on {name}'
