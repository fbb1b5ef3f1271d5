"""What the server needs of a model: the interface, and which implementation opens a folder."""

import abc
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any

from xmodal import storage
from xmodal.data.pictures import images
from xmodal.errors import UserError

SIZES = (2, 8, 32)
BUNDLE = 'bundle.json'  # a folder with this file is an exported model


class Picture(bytes):
  """A picture file that a client sent, in memory, with its decoded pixels.

  Attributes:
    decoded: see images.decode, no smaller than the model's input.
  """

  decoded: images.Decoded

  def __new__(cls, data: bytes, decoded: images.Decoded):
    self = super().__new__(cls, data)
    self.decoded = decoded
    return self


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One question to one task. It holds pictures, never paths or addresses.

  Attributes:
    pictures: () only for a task that draws; several only for one that ranks them.
    text: the question, names or texts; '' if the task reads no text.
    options: values by name, see Facts.options.
    details: whether the answer also has what a page shows (Task.details).
  """

  pictures: tuple[Picture, ...]
  text: str = ''
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  details: bool = False

  @property
  def rows(self) -> int:
    """Rows of a batch that the request takes."""
    return max(len(self.pictures), self.options.get('n', 1))


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a client has to know about a task.

  Attributes:
    draws: whether it draws pictures: a request then needs no picture, and runs alone.
    ranks: whether it ranks several pictures for a text, or several texts for a picture.
    reads_text: whether its text may not be empty.
    options: names of its options.
    writes: whether it can tell of a text while it writes it.
  """

  draws: bool = False
  ranks: bool = False
  reads_text: bool = False
  options: tuple[str, ...] = ()
  writes: bool = False


# Called on any thread with the finished steps, all steps, and what there is so far: pictures, uint8
# [N, H, W, 3], or a list of texts.
OnStep = Callable[[int, int, Any], None]


class Engine(abc.ABC):
  """A model that answers requests.

  One thread calls `answer` and what `programs` gives; others only use the rest.

  Attributes:
    name: name of the model.
    tasks: facts of each task.
    image_size: side of the model's input in pixels.
    most_rows: rows of the largest batch.
  """

  name: str
  tasks: Mapping[str, Facts]
  image_size: int
  most_rows: int

  @abc.abstractmethod
  def programs(self) -> Sequence[Callable[[], None]]:
    """Functions that compile one program each, together all that usual requests need."""

  @abc.abstractmethod
  def answer(self, task: str, requests: Sequence[Request], on_step: OnStep | None = None
             ) -> list[dict[str, Any] | UserError]:
    """Answers of one task to requests of up to most_rows rows together.

    Args:
      task: its name.
      requests: the requests; a single one with on_step.
      on_step: of a task that draws or writes.

    Returns:
      For each request its answer as plain JSON values, those of `xmodal predict --input`, or the
      UserError that says what is wrong with it.
    """


def open_engine(folder: str, sizes: Sequence[int], precision: str = '') -> Engine:
  """Loads a run or a bundle.

  Args:
    folder: a workdir, WORKDIR/best, WORKDIR/checkpoints/STEP, or a bundle of xmodal export.
    sizes: batch sizes to compile a run's programs for, ascending; (): SIZES.
    precision: of a run's weights, see Predictor.

  Raises:
    UserError: it is none of these, or is damaged.
  """
  if storage.exists(f'{folder.rstrip("/")}/{BUNDLE}'):
    for name, given in (('precision', precision), ('sizes', sizes)):
      if given:
        raise UserError(f'--{name} means nothing for the bundle {folder}: xmodal export chose it')
    from xmodal.serve.bundle_engine import BundleEngine
    return BundleEngine(folder, os.path.basename(folder.rstrip('/')))
  from xmodal.serve.trained_engine import TrainedEngine
  return TrainedEngine(folder, sizes or SIZES, os.path.basename(folder.rstrip('/')) or 'xmodal',
                       precision)
