"""Tasks as data: what a program needs around it, so that no code of the task has to run there."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

Dims = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Described:
  """The inputs of a task, and how its arrays become an answer.

  A bundle (xmodal.bundle) holds all of it but `features` as JSON, and its loader acts on it. The
  kinds of queries and fields are those in xmodal/bundle/README.md.

  Attributes:
    query: {'kind': ..., more for that kind}: how a picture and a text become inputs.
    inputs: the program's inputs besides pictures: name -> (dims, dtype). A dim is a number, or a
      letter for one that the caller chooses: 'b' is the batch.
    features: (inputs by name) -> the features of head.predict, on the device.
    outputs: names of the arrays of head.predict that the answer is made of.
    answer: fields of the answer in their order, each {'kind': ..., 'key': ..., more}.
    options: the user's options: name -> {'default': ..., 'help': ...}, with 'low' and 'high' for
      numbers.
    least: smallest values of the letters in `inputs`, 1 where none is named.
    most: their values in a program that has to know them.
  """

  query: Mapping[str, Any]
  inputs: Mapping[str, tuple[Dims, str]]
  features: Callable[[Mapping[str, Any]], Mapping[str, Any]]
  outputs: tuple[str, ...]
  answer: Sequence[Mapping[str, Any]]
  options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  least: Mapping[str, int] = dataclasses.field(default_factory=dict)
  most: Mapping[str, int] = dataclasses.field(default_factory=dict)


def written_field(key: str, **more: Any) -> dict[str, Any]:
  """The field of a text from writing.write."""
  return {'kind': 'text', 'key': key, 'tokens': 'tokens', 'log_probability': 'log_probability',
          **more}


WRITTEN = ('tokens', 'log_probability')  # outputs that written_field reads
