"""JSON that every parser accepts."""

import json
import math
from typing import Any


def dumps(value: Any, **options) -> str:
  """JSON text of a value, with null for numbers that are not finite: RFC 8259 has no NaN.

  Args:
    value: dicts, lists, tuples, strings, numbers, None.
    **options: options of json.dumps.
  """
  return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return value
