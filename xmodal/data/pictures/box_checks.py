"""Boxes that are not inside their pictures, and pictures that are not as the boxes' files say."""

import dataclasses

import numpy as np

from xmodal.data.example import Example, Source
from xmodal.data.faults import SLACK_PIXELS
from xmodal.data.pictures import images
from xmodal.errors import UserError

_LOOKED_AT = 32  # pictures of a split, before a run
_DECODED = (8, 8)  # pixels: as small as decoders go


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


def other_size(example: Example, width: int, height: int) -> str:
  """What is wrong with a picture that has boxes and another size than their files state; or ''.

  Args:
    example: the example.
    width, height: of its picture, upright, in pixels.
  """
  recorded = example.recorded_size
  if recorded in (None, (width, height)) or not (example.objects or example.expression):
    return ''
  turned = ', turned, as EXIF turns pictures' if recorded == (height, width) else ''
  return (f'is {width:g} x {height:g} pixels{turned}; the files of its boxes state '
          f'{recorded[0]:g} x {recorded[1]:g}, so they may lie elsewhere: mend the files, or put '
          'back the picture that the boxes were drawn on')


def size_notes(source: Source, name: str, flags: str) -> list[str]:
  """What to say before a run of a split whose pictures have other sizes than its files state.

  A few pictures are looked at: what shrinks or turns pictures seldom stops at one.

  Args:
    source: the split.
    name: what the run calls it.
    flags: of xmodal.data.check, to read the same split.
  """
  wrong, looked = [], 0
  if not isinstance(source[0].image, str):  # drawn when asked for
    return wrong
  for record in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)).tolist():
    example = source[record]
    if example.recorded_size is None:
      continue
    try:
      height, width = images.decode(example.image, _DECODED).size
    except UserError:
      continue  # reported where it is trained on
    looked += 1
    if line := other_size(example, width, height):
      wrong.append(f'{example.image}: {line}')
  return wrong and [
      f'{name}: {len(wrong)} of {looked} pictures looked at have another size than the files of '
      'their boxes state:', f'  {wrong[0]}', f'  all of them: xmodal check {flags}']


class BadBoxes:
  """Notes the bad boxes of records, each record once however often it is met.

  Attributes:
    of_record: record number -> a line on each of its bad boxes.
    of_size: path of a picture -> what other_size says of it.
  """

  def __init__(self):
    self.of_record: dict[int, list[str]] = {}
    self.of_size: dict[str, str] = {}

  def add(self, record: int, example: Example, complaints: list[str]) -> None:
    """Notes what keep_inside said of a record's example."""
    picture = example.image if isinstance(example.image, str) else 'pixels'
    self.of_record[record] = [f'record {record}, {picture}: {line}' for line in complaints]

  def add_size(self, example: Example, width: int, height: int) -> None:
    """Notes what other_size says of an example."""
    if line := other_size(example, width, height):
      self.of_size[str(example.image)] = f'{example.image}: {line}'

  def told(self) -> list[str]:
    """A line on each picture of another size, and on each bad box in the order of the records."""
    return [*sorted(self.of_size.values()), *self.told_boxes()]

  def told_boxes(self) -> list[str]:
    """A line on each bad box, in the order of the records."""
    return [line for record in sorted(self.of_record) for line in self.of_record[record]]
