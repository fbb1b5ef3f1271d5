"""The texts of an example, which a learned tokenizer knows."""

from collections.abc import Iterator

import numpy as np

from xmodal.data.example import Example


def texts_of(example: Example) -> Iterator[str]:
  """Yields the texts of an example; each name of its objects once."""
  yield from (example.question, *example.answers, *example.captions,
              *dict.fromkeys(thing.name for thing in example.objects or ()))
  if example.expression is not None:
    yield example.expression.name
  if example.number is not None:
    yield number_text(example.number)


def number_text(number: float) -> str:
  """A number as text: four significant digits, no exponent ('0.25', '12350')."""
  return np.format_float_positional(number, precision=4, fractional=False, trim='-')
