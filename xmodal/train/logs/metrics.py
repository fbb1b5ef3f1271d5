"""metrics.jsonl: the logged metrics of a run, one JSON object per line, each step once."""

from collections.abc import Iterable, Mapping, Sequence
import json
import os

from xmodal import atomic, strict_json


def read(path: str) -> tuple[list[dict], int]:
  """Reads the valid lines of a metrics.jsonl.

  A crash may truncate a line or leave NUL bytes, anywhere in the file.

  Args:
    path: path of the file, which may be missing.

  Returns:
    (objects in file order, number of unreadable lines). Each object has 'step' (int), 'split' and
    'task' (str), and metrics that are numbers or None. If several objects agree in the first three,
    the last counts.
  """
  if not os.path.exists(path):
    return [], 0
  with open(path, 'rb') as f:
    parts = [part for part in f.read().split(b'\n') if part.strip()]
  read_lines = list(map(_parse, parts))
  lines = {(line['step'], line['split'], line['task']): line for line in read_lines if line}
  return list(lines.values()), read_lines.count(None)


def _parse(data):
  """Parses one line; None if no run writes such a line."""
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


def numbers(line: Mapping) -> dict[str, float]:
  """The metrics of a line by name, 'TASK/NAME' or 'NAME' for all tasks; null is NaN."""
  task = '' if line['task'] == 'all' else f'{line["task"]}/'
  return {f'{task}{key}': float('nan') if number is None else number
          for key, number in line.items() if key not in ('step', 'split', 'task')}


def append(path: str, lines: Iterable[dict]) -> None:
  """Appends lines in one write, so that a kill leaves all of them or none."""
  with open(path, 'ab', buffering=0) as f:
    f.write(_text(lines))


def rewrite(path: str, lines: Sequence[dict]) -> None:
  """Replaces the file's content atomically."""
  with atomic.written(path, 'wb') as f:
    f.write(_text(lines))


def _text(lines):
  return ''.join(strict_json.dumps(line) + '\n' for line in lines).encode()
