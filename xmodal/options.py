"""Options: the keys of the config, each declared by the part of the program that reads it.

    OPTIONS = {
        'beams': Option(1, 'Beams of the search for an answer; 1: greedy.', low=1, may_change=True)}

From these declarations come the config with its defaults, its checks, the keys that a resumed run
may change, and the tables of keys in --help and in the guides (see xmodal.config).
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
import numpy as np

from xmodal.errors import UserError

# Limits of float32, the dtype of a step: lowest above 0, highest below 1, highest.
ABOVE_ZERO = float(np.finfo(np.float32).tiny)
BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
HIGHEST = float(np.finfo(np.float32).max)
_HIGHEST_INT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Option:
  """One key of the config.

  Attributes:
    default: value if a config gives none; its type is the type of the key.
    help: one sentence for the user.
    low, high: range of a number, inclusive; None: the limit of float32 or int32.
    choices: all allowed values; (): any.
    kind: type of the key if default is None.
    may_change: whether a run may be resumed or evaluated with another value.
    is_pattern: whether it is a regular expression.
  """

  default: Any
  help: str
  low: float | None = None
  high: float | None = None
  choices: tuple = ()
  kind: type | None = None
  may_change: bool = False
  is_pattern: bool = False

  def __post_init__(self):
    if self.default is None and self.kind is None:
      raise TypeError(f'Option(None, {self.help!r}): kind is missing')

  @property
  def type(self) -> type:
    """The type of its values."""
    return self.kind or type(self.default)

  @property
  def initial(self) -> Any:
    """The initial value in a ConfigDict: the default, or a placeholder of its type."""
    if self.type is dict:
      return ConfigDict(self.default)
    return placeholder(self.type) if self.default is None else self.default

  def check(self, name: str, value: Any) -> None:
    """Raises UserError if a value is invalid; name: 'config.vqa.beams', for the message."""
    if value is None:
      return
    if self.choices and value not in self.choices:
      raise UserError(f'{name}={value!r}: wanted {one_of(self.choices)}')
    if self.type in (int, float):
      check_number(name, value, self.low, self.high)
    if self.is_pattern:
      try:
        re.compile(value)
      except re.error as error:
        raise UserError(f'{name}={value!r} is no regular expression ({error})') from error

  def range(self) -> str:
    """The allowed values in words, such as '1 or more'; '' for any of its type."""
    if self.choices:
      return ', '.join(repr(choice) if choice == '' else str(choice) for choice in self.choices)
    if self.type not in (int, float) or (self.low is None and self.high is None):
      return ''
    return _range(self.low, self.high)


Options = Mapping[str, Option]


def one_of(values) -> str:
  """'a, b or c', for messages."""
  *first, last = [str(value) or "''" for value in values]
  return f'{", ".join(first)} or {last}' if first else last


def check_number(name: str, value: float, low: float | None, high: float | None) -> None:
  """Raises UserError if a value is not a number in low..high, or is NaN or infinite.

  low or high None: the limit of float32, or of int32 for whole numbers.
  """
  most = _HIGHEST_INT if isinstance(value, int) else HIGHEST
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  # Written so that NaN is outside.
  if is_number and (-most if low is None else low) <= value <= (most if high is None else high):
    return
  wanted = _range(low, high)
  if high is None and is_number and not value <= (low or 0):  # NaN, or too much
    wanted += f', at most {most:.3g}'
  raise UserError(f'{name}={value}: wanted {wanted}')


def _range(low, high):
  if high == BELOW_ONE:
    return f'{low} or more, below 1'
  if low == ABOVE_ZERO:
    return 'above 0' if high is None else f'above 0, at most {high}'
  if high is not None:
    return f'{low} to {high}'
  return 'a number' if low is None else f'{low} or more'
