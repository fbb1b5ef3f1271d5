"""Records of unusable pictures and boxes, over all processes and restarts of a run."""

from collections.abc import Iterator, Sequence
import json
import os

from xmodal import atomic
from xmodal.mixer.feed import Feed, each_split
from xmodal.sharding import hosts


def _tallies(feeds: Sequence[Feed]) -> Iterator[tuple[str, str, dict[str, dict]]]:
  """(name, use, {kind: {record or picture: fault}}) of each split, to read and to update."""
  for name, feed, use in each_split(feeds):
    boxes = feed.bad_boxes[use]
    yield name, use, {'pictures': feed.bad[use].reasons, 'boxes': boxes.of_record,
                      'sizes': boxes.of_size}


def exchange(feeds: Sequence[Feed]) -> None:
  """Shares the records of all processes; all processes must call it."""
  if hosts.several():
    for text in hosts.exchange(_text(feeds, ('train', 'eval'))):
      _fill(feeds, json.loads(text))


def save(feeds: Sequence[Feed], path: str) -> None:
  """Writes the records of the training split, for `load`."""
  text = _text(feeds, ('train',))
  if os.path.exists(path) or text != '{}':
    with atomic.written(path) as f:
      f.write(text)


def load(feeds: Sequence[Feed], path: str) -> None:
  """Adds the records that `save` wrote before a restart.

  They do not count towards config.data.max_bad_share: pictures may have been repaired since.
  """
  try:
    with open(path, encoding='utf-8') as f:
      _fill(feeds, json.load(f))
  except (OSError, ValueError, TypeError, AttributeError):
    pass  # missing, or truncated by a crash; the records serve only reports


def _text(feeds, uses):
  # Lists of pairs, because JSON keys cannot be numbers.
  return json.dumps({name: {kind: list(of_kind.items()) for kind, of_kind in kinds.items()}
                     for name, use, kinds in _tallies(feeds)
                     if use in uses and any(kinds.values())})


def _fill(feeds, saved):
  for name, _, kinds in _tallies(feeds):
    for kind, of_kind in kinds.items():
      for record, fault in saved.get(name, {}).get(kind, ()):
        of_kind.setdefault(record, fault)
