"""A trained model as a function of pictures and texts, see xmodal.load."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import re
from typing import Any
import warnings

import numpy as np
from PIL import Image

from xmodal.answers import Query, answers
from xmodal.data.fields import shown
from xmodal.data.pictures import images
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.errors import UserError
from xmodal.predictor import Predictor
from xmodal.tasks.task import Task
from xmodal.train.process.compilation_cache import enable_compilation_cache

Picture = str | os.PathLike | Image.Image | np.ndarray

_OF_COMMANDS = ('n', 'progress')  # options of queries that make no sense in Python
_FLAG = re.compile(r'(?<![\w-])--(?=[a-z])')


class TrainedModel:
  """Answers about pictures, or draws them.

    model = xmodal.load('runs/vqa')
    model('a.jpg', 'what color is the square?').answer
    model(['a.jpg', 'b.jpg'], 'what color is the square?')  # a list of two Answers

  A call with one picture and one text compiles a program of its own, the first time; a call with a
  list compiles one for a batch of 32, whatever the length of the list. JAX keeps compiled programs
  in the user's cache folder (xmodal/train/process/compilation_cache.py), so that a second start is
  quick.
  """

  def __init__(self, folder: str | os.PathLike, precision: str = ''):
    """Loads a checkpoint, see xmodal.load."""
    enable_compilation_cache()
    self._opened = DecodedPictures()
    self._predictor = Predictor(folder, self._opened, precision)

  @property
  def tasks(self) -> tuple[str, ...]:
    """The tasks that the model was trained on."""
    return tuple(self._predictor.tasks)

  def __call__(self, image: Picture | Sequence[Picture] | None, text: str | Sequence[str] = '', *,
               task: str | None = None, **options) -> Any:
    """Asks one task about pictures.

    Args:
      image: a path, a picture of Pillow's, or uint8 pixels [H, W, 3], red, green, blue; or a list
        of them. None where a task that draws is given no picture to change.
      text: the query, as in xmodal predict; for a list one for all, or a list of the same
        length.
      task: one of `tasks`; None: the first.
      **options: of the task (generation: guidance, steps, seed, mask, strength; see xmodal predict
        --help); each one for all, or a list of the same length.

    Returns:
      The task's prediction, or a list of them if anything is a list: vqa.Answer,
      objects.NamedObjects, captioning.Caption, regression.Number, detection.task.Detections,
      retrieval.task.Ranking, generation.task.GeneratedImage (all in xmodal.tasks). Retrieval ranks:
      a list of pictures for one text, or a list of texts for one picture, gives one Ranking.

    Raises:
      UserError: a picture cannot be read, the text asks nothing, or the model has no such task.
    """
    chosen = self._task(task)
    if unknown := sorted(set(options) - self._options(chosen)):
      wanted = ', '.join(sorted(self._options(chosen))) or 'none'
      raise UserError(f'{unknown[0]} means nothing to {chosen.name}; its options: {wanted}')
    notes, given = {}, {'image': image, 'text': text, **options}
    lists = [value for value in given.values() if _is_list(value)]
    one = not lists or (chosen.takes_folders and len(lists) == 1)
    rows = [given] if one else _rows(given)
    with _said_in_python():
      found = list(self._found(chosen, rows, notes, fixed=not one))
    if notes:
      more = f' (and {len(notes) - 1} notes more)' if len(notes) > 1 else ''
      warnings.warn(without_flags(next(iter(notes))) + more, stacklevel=2)
    return found[0] if one else found

  def plain(self, prediction: Any, task: str | None = None) -> Any:
    """A prediction of a task as plain JSON values, as xmodal predict writes it; of a list, a list.

    A picture is "png": a PNG file in base64. task: that of the prediction; None: the first.
    """
    if isinstance(prediction, list):
      return [self.plain(one, task) for one in prediction]
    return self._task(task).plain(prediction)

  def _task(self, name: str | None) -> Task:
    return self._predictor.task(name or self.tasks[0])

  def _options(self, task):
    return set(task.query_options).difference(_OF_COMMANDS)

  def _found(self, task, rows, notes, fixed) -> Iterator[Any]:
    """The predictions for rows of arguments; their notes are added to `notes`."""
    queries = (_query(task, row, notes) for row in rows)
    if task.takes_folders and not fixed:  # perhaps of many pictures: not all opened at once
      (own, examples), = queries
      batches = self._predictor.batches(examples, own, fixed=len(examples) > 1)
      yield own.join(examples, [prediction for _, some in batches for prediction in some])
      return
    for answer in answers(self._predictor, self._opened, queries, fixed=fixed):
      if isinstance(answer, UserError):
        raise answer
      yield answer


def _query(task: Task, row: dict[str, Any], notes: dict[str, None]) -> Query:
  """The query of one row of arguments."""
  options = dict(row)
  image, text = options.pop('image'), options.pop('text')
  if image is None and not task.draws:
    raise UserError(f'image is None; {task.name} wants a picture')
  for one in text if _is_list(text) else [text]:
    if not isinstance(one, str):
      raise UserError(f'text is {shown(one)}; wanted text')
  if options.get('mask') is not None:
    options['mask'] = _picture(options['mask'], 'black')  # where it is transparent nothing is white
  task, examples = task.query(
      [_picture(one) for one in image] if _is_list(image) else _picture(image), text, **options)
  notes.update((note, None) for example in examples for note in task.notes(example))
  return task, examples


def _picture(value: Picture | None, behind: str = 'white') -> str | np.ndarray | None:
  """A picture as an Example has it."""
  if isinstance(value, Image.Image):
    return images.from_pillow(value, behind)
  if isinstance(value, (str, os.PathLike)):
    return os.path.expanduser(os.fspath(value))
  if value is None or isinstance(value, np.ndarray):
    return value
  raise UserError(f'image is a {type(value).__name__}; wanted a path, a PIL image or a NumPy array '
                  'uint8 [height, width, 3]')


def _is_list(value):
  return isinstance(value, (list, tuple, range))


def _rows(given: dict[str, Any]) -> list[dict[str, Any]]:
  """Arguments, some of which are lists of one length, as one dict for each place of the lists."""
  lengths = {name: len(value) for name, value in given.items() if _is_list(value)}
  if len(set(lengths.values())) > 1:
    found = ', '.join(f'{length} of {name}' for name, length in lengths.items())
    raise UserError(f'lists of several lengths ({found}); wanted lists of one length, or one for '
                    'all')
  return [{name: value[place] if name in lengths else value for name, value in given.items()}
          for place in range(next(iter(lengths.values())))]


@contextlib.contextmanager
def _said_in_python():
  """Errors of queries speak of --text; in Python it is text."""
  try:
    yield
  except UserError as error:
    raise UserError(without_flags(str(error))) from None


def without_flags(message: str) -> str:
  """A message about a query without the dashes of the command line: '--text' becomes 'text'."""
  return _FLAG.sub('', message)
