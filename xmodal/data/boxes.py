"""Boxes that are not inside their pictures."""

import dataclasses

import numpy as np

from xmodal.data.example import Example

# Annotation tools round: half a pixel beyond the edge is no mistake.
_SLACK_PIXELS = 0.5


def keep_inside(example: Example, width: int, height: int) -> tuple[Example, list[str]]:
  """An example with the boxes of its objects and its expression inside its picture.

  A box that sticks out is cut at the edge; what has no area in the picture is
  left out.

  Args:
    example: the example.
    width, height: of its picture, upright, in pixels.

  Returns:
    The example (as it was, if nothing is wrong), and a line on each bad box.
  """
  things = [*(example.objects or ()), *filter(None, [example.expression])]
  if not things:
    return example, []
  boxes = np.array([thing.box for thing in things], np.float64)
  low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
  inside_low, inside_high = (np.clip(corner, 0, (width, height)) for corner in (low, high))
  there = (inside_high > inside_low).all(1)
  beyond = ((low < -_SLACK_PIXELS) | (high > np.add((width, height), _SLACK_PIXELS))).any(1)
  if there.all() and not beyond.any():
    return example, []

  complaints, count = [], len(example.objects or ())
  for i in np.flatnonzero(beyond | ~there):
    what = f'objects {i + 1}' if i < count else 'expression'
    fault = 'outside the picture' if beyond[i] else 'without area in the picture'
    complaints.append(f'{what} has box {list(things[i].box)} {fault}, wanted [x, y, width, height] '
                      f'inside {width} x {height}')
    if there[i]:
      box = *inside_low[i].tolist(), *(inside_high[i] - inside_low[i]).tolist()
      things[i] = dataclasses.replace(things[i], box=box)
  changed = {}
  if example.objects is not None:
    changed['objects'] = tuple(thing for thing, ok in zip(things[:count], there) if ok)
  if example.expression is not None:
    changed['expression'] = things[-1] if there[-1] else None
  return dataclasses.replace(example, **changed), complaints


class BadBoxes:
  """Notes the bad boxes of records, each record once however often it is met.

  Attributes:
    of_record: record number -> a line on each of its bad boxes.
  """

  def __init__(self):
    self.of_record: dict[int, list[str]] = {}

  def add(self, record: int, example: Example, complaints: list[str]) -> None:
    """Notes what keep_inside said of a record's example."""
    picture = example.image if isinstance(example.image, str) else 'pixels'
    self.of_record[record] = [f'record {record}, {picture}: {line}' for line in complaints]

  def told(self) -> list[str]:
    """A line on each bad box, in the order of the records."""
    return [line for record in sorted(self.of_record) for line in self.of_record[record]]
