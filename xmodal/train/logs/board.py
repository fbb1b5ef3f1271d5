"""TensorBoard event files of a run: the metrics of metrics.jsonl, each step once.

A killed run leaves metrics that the resumed run writes again. TensorBoard can drop all metrics from
a step on, but then it loses those of that step, and other readers still show steps twice. So each
start writes the metrics that are still valid into a new file and removes the old files.
"""

from collections.abc import Callable, Iterable, Mapping
import itertools
import os
import re
import socket
import struct
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import masked_crc32c

from xmodal.train.logs import metrics

_NAME = re.compile(r'events\.out\.tfevents\.(\d+)\.')


class Board:
  """Writes an event file; flushes every event."""

  def __init__(self, folder: str, lines: Iterable[Mapping], keep: Callable[[int, str], bool]):
    """Starts a file with the metrics logged so far.

    Args:
      folder: folder of the event files; created if missing.
      lines: lines of metrics.jsonl to show.
      keep: (step, split) -> whether metrics found only in event files are still valid.
    """
    os.makedirs(folder, exist_ok=True)
    old = {name: int(found[1]) for name in os.listdir(folder) if (found := _NAME.match(name))}
    # TensorBoard reads files in order of their names.
    second = max([int(time.time()), *(then + 1 for then in old.values())])
    self._path = os.path.join(folder, f'events.out.tfevents.{second}.{socket.gethostname()}')
    shown = _shown([os.path.join(folder, name) for name in sorted(old)])
    values = {place: found for place, found in shown.items()
              if keep(place[1], place[0].partition('/')[0])}
    now = time.time()
    for line in lines:
      for value in _values(line['split'], metrics.numbers(line)):
        values.setdefault((value.tag, line['step']), (now, value))
    part = os.path.join(folder, 'history.part')
    with open(part, 'wb') as f:
      f.write(_record(Event(wall_time=now, file_version='brain.Event:2')))
      if old:  # makes a running TensorBoard drop the metrics of the old files
        f.write(_record(Event(wall_time=now, step=0,
                              session_log=SessionLog(status=SessionLog.START))))
      ordered = sorted(values.items(), key=lambda item: item[0][1])
      for (step, wall_time), group in itertools.groupby(
          ordered, lambda item: (item[0][1], item[1][0])):
        f.write(_record(Event(wall_time=wall_time, step=step,
                              summary={'value': [value for _, (_, value) in group]})))
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, self._path)
    for name in old:
      os.remove(os.path.join(folder, name))

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """Writes the metrics of one step as SPLIT/NAME."""
    event = Event(wall_time=time.time(), step=step,
                  summary={'value': list(_values(split, numbers))})
    with open(self._path, 'ab') as f:
      f.write(_record(event))

  def close(self) -> None:
    """Nothing to do: each event is written at once."""


def _values(split, numbers):
  for key, number in numbers.items():
    yield Summary.Value(tag=f'{split}/{key}', simple_value=number)


def _record(event):
  """An event as a TFRecord: length, data, and a checksum of each."""
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  return b''.join((length, struct.pack('<I', masked_crc32c(length)),
                   data, struct.pack('<I', masked_crc32c(data))))


def _shown(paths):
  """The metrics in event files: {(tag, step): (wall time, value)}."""
  shown = {}
  for path in paths:
    for event in _events(path):
      if event.HasField('session_log') and event.session_log.status == SessionLog.START:
        shown = {place: found for place, found in shown.items() if place[1] < event.step}
      for value in event.summary.value:
        shown[value.tag, event.step] = (event.wall_time, value)
  return shown


def _events(path):
  """The events of a file, up to its first damage."""
  with open(path, 'rb') as f:
    data = f.read()
  place = 0
  while place + 12 <= len(data):
    length, of_length = struct.unpack_from('<QI', data, place)
    begin, end = place + 12, place + 12 + length
    if masked_crc32c(data[place:place + 8]) != of_length or end + 4 > len(data):
      return
    event, of_event = data[begin:end], struct.unpack_from('<I', data, end)[0]
    if masked_crc32c(event) != of_event:
      return
    yield Event.FromString(event)
    place = end + 4
