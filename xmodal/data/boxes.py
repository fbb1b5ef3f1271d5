"""Boxes that are not inside their pictures."""

import dataclasses

from xmodal.data.example import Example
from xmodal.data.faults import SLACK_PIXELS


def keep_inside(example: Example, width: int, height: int) -> tuple[Example, list[str]]:
  """An example with the boxes of its objects and its expression inside its picture.

  What sticks out is cut off at the edge; what then has no area is left out.

  Args:
    example: the example.
    width, height: of its picture, upright, in pixels.

  Returns:
    The example (as it was, if all is inside), and a line on each box that was bad:
    without area, or out by more than half a pixel.
  """
  things = [*(example.objects or ()), *filter(None, [example.expression])]
  # Not in numpy, which would take longer to be told the boxes than this takes.
  if all(x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height
         for x, y, w, h in (thing.box for thing in things)):
    return example, []

  complaints, count = [], len(example.objects or ())
  for i, thing in enumerate(things):
    x, y, w, h = thing.box
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    outside = max(x0 - x, y0 - y, x + w - x1, y + h - y1) > SLACK_PIXELS
    there = x1 > x0 and y1 > y0
    if outside or not there:
      complaints.append(
          f'{f"objects {i + 1}" if i < count else "expression"} has box {list(thing.box)} '
          f'{"outside the picture" if outside else "without area in the picture"}, '
          f'wanted [x, y, width, height] inside {width} x {height}')
    things[i] = dataclasses.replace(thing, box=(x0, y0, x1 - x0, y1 - y0)) if there else None
  return dataclasses.replace(
      example,
      objects=None if example.objects is None else tuple(filter(None, things[:count])),
      expression=things[count] if example.expression else None), complaints


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
