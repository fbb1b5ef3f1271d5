"""metrics.jsonl: the numbers of a run, one JSON object a line, those of a step once."""

from collections.abc import Iterable, Sequence
import json
import os

from xmodal import atomic, strict_json


def read(path: str) -> tuple[list[dict], int]:
  """The lines of a metrics.jsonl that can be read.

  A crash may cut a line short or leave NUL bytes, anywhere in the file.

  Args:
    path: of the file; there may be none.

  Returns:
    The objects, in the order of the file: each has 'step' (int), 'split' and 'task' (str), and
    numbers or None. Of several with the same three, the last counts. And the number of lines that
    cannot be read.
  """
  if not os.path.exists(path):
    return [], 0
  with open(path, 'rb') as f:
    parts = [part for part in f.read().split(b'\n') if part.strip()]
  read_lines = list(map(_parse, parts))
  lines = {(line['step'], line['split'], line['task']): line for line in read_lines if line}
  return list(lines.values()), read_lines.count(None)


def _parse(data):
  """One line as an object; None if it is none that a run writes."""
  try:
    line = json.loads(data.strip(b'\0').decode())
  except (ValueError, RecursionError):
    return None
  if not isinstance(line, dict) or not all(
      isinstance(line.get(key), kind) and not isinstance(line[key], bool)
      for key, kind in (('step', int), ('split', str), ('task', str))):
    return None
  numbers = (value for key, value in line.items() if key not in ('step', 'split', 'task'))
  return line if all(value is None or type(value) in (int, float) for value in numbers) else None


def append(path: str, lines: Iterable[dict]) -> None:
  """Adds lines in one write, so that a kill leaves all of them or none."""
  with open(path, 'ab', buffering=0) as f:
    f.write(_text(lines))


def rewrite(path: str, lines: Sequence[dict]) -> None:
  """Puts lines in the place of all that the file has, at once."""
  with atomic.written(path, 'wb') as f:
    f.write(_text(lines))


def _text(lines):
  return ''.join(strict_json.dumps(line) + '\n' for line in lines).encode()
