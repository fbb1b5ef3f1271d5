"""Checks of the fields of a JSON record, shared by all readers of JSON files.

A check takes a parsed JSON value and returns the value to use, or raises Complaint.
null and a missing field are both None; `optional` accepts it.
"""

from collections.abc import Callable, Mapping
import math
import re
import sys
from typing import Any

Check = Callable[[Any], Any]

# C0 controls other than white space, DEL, and lone surrogates.
_NOT_TEXT = re.compile('[\0-\x08\x0e-\x1b\x7f\ud800-\udfff]')
_MOST_KNOWN = 1 << 17  # texts that are known to be accepted
_LARGEST_EXACT = 2**53  # float64 represents every whole number up to here


class Complaint(Exception):
  """What is wrong with one value: 'is 3, wanted text'."""


def check_fields(record: Mapping[str, Any], checks: Mapping[str, Check]
                 ) -> tuple[dict[str, Any], list[str]]:
  """The valid fields of a record, and a complaint about each invalid one.

  Args:
    record: a JSON object; its other keys are ignored.
    checks: field -> its check.
  """
  values, complaints = {}, []
  for key, check in checks.items():
    try:
      values[key] = check(record.get(key))
    except Complaint as complaint:
      what = str(complaint)
      if key not in record:
        what = what.replace('is None', 'is missing', 1)
      complaints.append(f'{key} {what}')
  return values, complaints


def optional(check: Check, default: Any = None) -> Check:
  """A check that accepts what `check` does, and null, which becomes `default`."""
  return lambda value: default if value is None else check(value)


def text(value: Any) -> str:
  """Text, unchanged."""
  if not isinstance(value, str):
    raise Complaint(f'is {shown(value)}, wanted text')
  # isprintable is fast and true for nearly every text.
  if not value.isprintable() and (found := _NOT_TEXT.search(value)):
    what = ('half characters (\\ud800 to \\udfff alone)' if found[0] >= '\ud800' else
            'control characters')
    raise Complaint(f'is {shown(value)}, wanted text without {what}')
  return value


def trimmed(value: Any) -> str:
  """Text, stripped of surrounding white space."""
  return text(value).strip()


def filled_text(value: Any) -> str:
  """As trimmed, but not empty."""
  if not (found := trimmed(value)):
    raise Complaint(f'is {shown(value)}, wanted text, not empty')
  return found


def path(value: Any) -> str:
  """Text that is not empty, unchanged: spaces are part of a file's name."""
  if not text(value):
    raise Complaint(f'is {shown(value)}, wanted the path of a file')
  return value


def name(value: Any) -> str:
  """As filled_text, on one line, with single spaces between words. Interned: equal names share
  one object."""
  return sys.intern(' '.join(filled_text(value).split()))


def answer(value: Any) -> str:
  """Text, or a number as people write it: 2.0 as '2'. Interned: millions of answers are a few
  thousand different ones."""
  if isinstance(value, str):
    return sys.intern(value if value.isprintable() else text(value))
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise Complaint(f'is {shown(value)}, wanted text or a number')
  return str(int(value)) if number(value).is_integer() else repr(value)


def number(value: Any) -> float:
  """A finite number."""
  try:
    if not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  except (TypeError, OverflowError):
    pass
  raise Complaint(f'is {shown(value)}, wanted a finite number')


def whole_number(value: Any) -> int:
  """A whole number, including one written as 7.0."""
  if type(value) is int:  # nearly always
    return value
  if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT:
    return int(value)
  if isinstance(value, bool) or not isinstance(value, int):
    raise Complaint(f'is {shown(value)}, wanted a whole number')
  return value


def identifier(value: Any) -> int | str:
  """A whole number or text: the key that joins records of two files."""
  if isinstance(value, str):
    return text(value)
  try:
    return whole_number(value)
  except Complaint:
    raise Complaint(f'is {shown(value)}, wanted a whole number or text') from None


def flag(value: Any) -> bool:
  """true or false, also as 1 or 0."""
  if value in (True, False) and isinstance(value, (bool, int, float)):
    return bool(value)
  raise Complaint(f'is {shown(value)}, wanted true or false')


def list_of(check: Check) -> Check:
  """A list, each item of which `check` accepts -> tuple."""
  def check_list(value):
    if not isinstance(value, list):
      raise Complaint(f'is {shown(value)}, wanted a list')
    try:
      return tuple(map(check, value))  # faster
    except Complaint:
      found = []
    for place, item in enumerate(value, 1):
      try:
        found.append(check(item))
      except Complaint as complaint:
        raise Complaint(f'{place} {complaint}') from None
    return tuple(found)
  return check_list


def member(key: str, check: Check) -> Check:
  """Checks one field of a JSON object and keeps only its value."""
  def check_member(value):
    if not isinstance(value, dict):
      raise Complaint(f'is {shown(value)}, wanted an object with {key!r}')
    try:
      return check(value.get(key))
    except Complaint as complaint:
      raise Complaint(f'has {key!r} that {complaint}') from None
  return check_member


def list_of_members(key: str, check: Check) -> Check:
  """As list_of(member(key, check)), faster for texts that recur."""
  check_list, known = list_of(member(key, check)), {}

  def check_members(value):
    if isinstance(value, list):
      try:
        return tuple([known[item[key]] for item in value])
      except (KeyError, TypeError):
        pass
    found = check_list(value)
    if len(known) > _MOST_KNOWN:
      known.clear()
    known.update((item[key], accepted) for item, accepted in zip(value, found)
                 if isinstance(item[key], str))
    return found
  return check_members


def shown(value: Any) -> str:
  """A value found in a file, short enough for one line."""
  try:
    found = repr(value)
  except RecursionError:
    return f'a {type(value).__name__} nested too deeply'
  return found if len(found) <= 60 else f'{found[:57]}...'
