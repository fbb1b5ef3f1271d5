"""Decisions that all processes of a run take together.

A process that failed or stopped alone would leave the others waiting at a barrier for ever.
"""

from collections.abc import Callable
import socket

import jax
from jax.experimental import multihost_utils
import numpy as np

from xmodal.errors import UserError

_BYTES = 2048  # of the longest text that processes exchange


def gather(text: str) -> list[str]:
  """The texts of all processes, in their order; every process has to call it."""
  if jax.process_count() == 1:
    return [text]
  row = np.zeros(_BYTES, np.uint8)
  data = text.encode('utf-8', 'backslashreplace')[:_BYTES]
  row[:len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [bytes(row).rstrip(b'\0').decode('utf-8', 'ignore') for row in np.asarray(rows)]


def agree(action: Callable[[], str], *, lead: bool = False) -> str:
  """Runs an action on every process, or on the first alone, and fails on all if it fails on one.

  Args:
    action: returns a text.
    lead: whether only process 0 runs it.

  Returns:
    What it returned on process 0.

  Raises:
    UserError: the action raised one, on whichever process.
    Exception: whatever else this process raised; the others raise UserError that says so.
  """
  error, said = None, ''
  try:
    if not lead or jax.process_index() == 0:
      said = f'={action()}'
  except Exception as raised:  # to be raised after the others know
    error = raised
    said = f'!{raised}' if isinstance(raised, UserError) else f'?{type(raised).__name__}: {raised}'
  answers = gather(said)
  if error is not None and not isinstance(error, UserError):
    raise error
  for kind in '!?':
    for number, answer in enumerate(answers):
      if answer.startswith(kind):
        what = answer[1:] if kind == '!' else f'process {number} failed ({answer[1:]})'
        raise UserError(what) from error
  return answers[0][1:]


def here() -> str:
  """This process in words: its number, where there are several, and its machine."""
  name = socket.gethostname()
  return name if jax.process_count() == 1 else f'process {jax.process_index()} on {name}'
