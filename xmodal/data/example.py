"""The schema that every data set is read into."""

from collections.abc import Callable, Hashable, Mapping
import dataclasses
import hashlib
import os
from typing import Any, Protocol
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Object:
  """An object in a picture.

  Attributes:
    name: its class or description, as a person would name it ('red circle').
    box: (x, y, width, height) in pixels of the picture as stored, after its
      EXIF rotation; x grows to the right and y downwards, (0, 0) is the outer
      corner of the top left pixel.
    ignore: detecting it is neither required nor an error: many things in one box
      (COCO's iscrowd), or one too hard to judge (Pascal VOC's difficult).
    area: in square pixels, if it differs from the box's (COCO: area of the outline).
    category_id: the data set's number of the category, if it has one.
  """

  name: str
  box: tuple[float, float, float, float]
  ignore: bool = False
  area: float | None = None
  category_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Packed:
  """A picture file inside a larger file, whose bytes are read when it is decoded.

  A source with millions of pictures can then list its examples without holding pictures in memory.

  Attributes:
    name: where it is, such as '/data/train-0001.tar: 17.jpg'; Packed of one name are equal.
    read: returns the bytes of the picture file; called from several threads.
  """

  name: str
  read: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)

  def __str__(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
  """One picture with its annotations.

  A source fills the fields it has; a task names the fields it needs.

  Attributes:
    image: path of a picture file, its bytes, a Packed one, the paths of two
      (xmodal.data.pictures.images.SideBySide), or uint8 pixels [H, W, 3].
    image_id: the data set's own number or name of the picture.
    question: the question, or ''.
    answers: people's answers: one entry per person, repeats kept.
    question_id: the data set's own number or name of the question.
    question_type: the question's group in the accuracy table, or ''.
    captions: sentences that describe the picture.
    objects: the objects in the picture; () if there are none, None if not annotated.
    expression: the object that a referring expression means; its name is the text ('the square
      left of the red circle').
    number: target of a regression task, or None.
    reason: why the answer is right, in one sentence, or ''.
    made: whether the annotations were made by a model (xmodal augment) and not by people.
    inputs: inputs of other senses by name (see data.sense); None: no such inputs.
    recorded_size: (width, height) in pixels that the data set's files state for the picture on
      which the boxes were drawn; the actual picture may differ.
  """

  image: str | bytes | Packed | np.ndarray
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
    """Whether all of these are filled: fields, or inputs of senses by name."""
    return all(getattr(self, field) != DEFAULTS[field] if field in DEFAULTS
               else field in (self.inputs or {}) for field in fields)

  def seed(self) -> np.int32:
    """Random seed of the picture, the same at every read."""
    if self.image_id is not None:
      identity = repr(self.image_id).encode()
    elif isinstance(self.image, np.ndarray):
      identity = self.image.tobytes()
    elif isinstance(self.image, bytes):
      identity = self.image
    else:
      identity = str(self.image).encode()
    return np.uint32(zlib.crc32(identity)).astype(np.int32)

  @property
  def picture(self) -> Hashable:
    """What tells the picture from others: its path or place, or a digest of its bytes or pixels."""
    if isinstance(self.image, np.ndarray):
      return self.image.shape, hashlib.blake2b(self.image.tobytes(), digest_size=16).digest()
    if isinstance(self.image, bytes):
      return hashlib.blake2b(self.image, digest_size=16).digest()
    return self.image

  @property
  def file_name(self) -> str:
    """Name of the picture for messages: its path or place; '' for bytes and pixels."""
    return str(self.image) if isinstance(self.image, str | os.PathLike | Packed) else ''


# Values of fields that are not filled.
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Example)
            if field.default is not dataclasses.MISSING}


class Source(Protocol):
  """A sequence of Examples that can be read independently of each other."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, index: int) -> Example:
    ...
