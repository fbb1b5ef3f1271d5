"""Finds boxes outside their pictures, and pictures whose size differs from the one recorded."""

import dataclasses

import numpy as np

from xmodal.data.example import Example, Source
from xmodal.data.faults import SLACK_PIXELS
from xmodal.data.pictures import images
from xmodal.errors import UserError

_NUM_CHECKED = 32  # pictures of a split that are checked before a run
_DECODED = (8, 8)  # pixels: as small as decoders go


def keep_inside(example: Example, width: int, height: int) -> tuple[Example, list[str]]:
  """Clips the boxes of an example's objects and expression to its picture.

  Boxes without area after clipping are removed.

  Args:
    example: the example.
    width, height: of its picture, upright, in pixels.

  Returns:
    The example (unchanged if all boxes are inside), and a line on each bad box: one
    without area, or outside by more than half a pixel.
  """
  things = [*(example.objects or ()), *filter(None, [example.expression])]
  # Not in numpy: converting the boxes to an array would take longer than this.
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
  """Complaint about a picture with boxes whose size differs from the recorded one; '' if none.

  Args:
    example: the example.
    width, height: of its picture, upright, in pixels.
  """
  recorded = example.recorded_size
  if recorded in (None, (width, height)) or not (example.objects or example.expression):
    return ''
  turned = ', turned, as EXIF turns pictures' if recorded == (height, width) else ''
  return (f'is {width:g} x {height:g} pixels{turned}; the files of its boxes state '
          f'{recorded[0]:g} x {recorded[1]:g}, so they may not fit: correct the files, or restore '
          'the picture on which the boxes were drawn')


def size_notes(source: Source, name: str, flags: str) -> list[str]:
  """Warnings before a run about a split whose pictures differ in size from the recorded sizes.

  Checks a sample of the pictures: a tool that shrinks or rotates pictures seldom stops at one.

  Args:
    source: the split.
    name: the split's name in messages.
    flags: of xmodal.data.check, to read the same split.
  """
  wrong, num_checked = [], 0
  if not isinstance(source[0].image, str):  # generated on access
    return wrong
  for record in np.unique(np.linspace(0, len(source) - 1, _NUM_CHECKED).astype(int)).tolist():
    example = source[record]
    if example.recorded_size is None:
      continue
    try:
      height, width = images.decode(example.image, _DECODED).size
    except UserError:
      continue  # reported during training
    num_checked += 1
    if line := other_size(example, width, height):
      wrong.append(f'{example.image}: {line}')
  return wrong and [
      f'{name}: {len(wrong)} of {num_checked} pictures checked differ in size from the files of '
      'their boxes:', f'  {wrong[0]}', f'  all of them: xmodal check {flags}']


class BadBoxes:
  """Collects the bad boxes of records, each record once however often it is read.

  Attributes:
    of_record: record number -> a line on each of its bad boxes.
    of_size: path of a picture -> the complaint of other_size.
  """

  def __init__(self):
    self.of_record: dict[int, list[str]] = {}
    self.of_size: dict[str, str] = {}

  def add(self, record: int, example: Example, complaints: list[str]) -> None:
    """Records the complaints of keep_inside about a record's example."""
    picture = example.file_name or 'pixels'
    self.of_record[record] = [f'record {record}, {picture}: {line}' for line in complaints]

  def add_size(self, example: Example, width: int, height: int) -> None:
    """Records the complaint of other_size about an example, if any."""
    if line := other_size(example, width, height):
      name = example.file_name or f'picture {example.image_id}'
      self.of_size[name] = f'{name}: {line}'

  def lines(self) -> list[str]:
    """A line on each picture of a wrong size, then on each bad box in the order of the records."""
    return [*sorted(self.of_size.values()), *self.box_lines()]

  def box_lines(self) -> list[str]:
    """A line on each bad box, in the order of the records."""
    return [line for record in sorted(self.of_record) for line in self.of_record[record]]
