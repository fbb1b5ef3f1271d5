"""The one schema every data set is read into."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Object:
  """A thing in a picture.

  Attributes:
    name: what it is, as a person would call it ('red circle').
    box: (x, y, width, height) in pixels of the picture as stored, after its
      EXIF rotation; x grows to the right and y downwards, (0, 0) is the outer
      corner of the top left pixel.
    ignore: neither to be found nor wrong to find: many things in one box
      (COCO's iscrowd), or one too hard to judge (Pascal VOC's difficult).
    area: in square pixels, where it is not that of the box (COCO's, of the outline).
    category_id: the data set's own number of the name, if it has one.
  """

  name: str
  box: tuple[float, float, float, float]
  ignore: bool = False
  area: float | None = None
  category_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Example:
  """One picture with whatever is known about it.

  A source fills the fields it has; a task names the fields it needs.

  Attributes:
    image: path of a picture file, or uint8 pixels [H, W, 3].
    image_id: the data set's own number or name of the picture.
    question: the question asked, or ''.
    answers: what people answered: one entry a person, repeats kept.
    question_id: the data set's own number or name of the question.
    question_type: the group the accuracy table lists it under, or ''.
    captions: sentences that describe the picture.
    objects: the things in the picture; () says there are none, None that
      nobody looked.
    expression: the one thing that a text means; its name is the text ('the square left of
      the red circle').
    number: a number to be predicted, or None.
    reason: why the answer is right, in one sentence, or ''.
    made: whether a model made what is known of the picture (xmodal.augment), and not people.
    inputs: of other senses, by their names (see data.sense); None: there are none.
    recorded_size: (width, height) in pixels that the data set's files state for the picture its
      boxes were drawn on; the picture itself may have another.
  """

  image: str | np.ndarray
  question: str = ''
  answers: tuple[str, ...] = ()
  question_id: int | str | None = None
  question_type: str = ''
  captions: tuple[str, ...] = ()
  objects: tuple[Object, ...] | None = None
  expression: Object | None = None
  number: float | None = None
  reason: str = ''
  image_id: int | str | None = None
  made: bool = False
  recorded_size: tuple[float, float] | None = None
  inputs: Mapping[str, Any] | None = None

  def has(self, *fields: str) -> bool:
    """Whether all of these fields are filled, or inputs of these senses there."""
    return all(getattr(self, field) != getattr(Example, field) if hasattr(Example, field)
               else field in (self.inputs or {}) for field in fields)

  def seed(self) -> np.int32:
    """A number for what is drawn at random for its picture, the same whenever it is read."""
    if self.image_id is not None:
      identity = repr(self.image_id).encode()
    elif isinstance(self.image, np.ndarray):
      identity = self.image.tobytes()
    else:
      identity = self.image.encode()
    return np.uint32(zlib.crc32(identity)).astype(np.int32)


class Source(Protocol):
  """A sequence of Examples; reading one must not depend on any other."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, index: int) -> Example:
    ...
