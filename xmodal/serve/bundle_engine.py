"""The engine on a bundle of xmodal export."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from xmodal import downloads, storage
from xmodal.bundle.model import BundleError, load
from xmodal.errors import UserError
from xmodal.serve.engine import Engine, Facts, Picture
from xmodal.tasks.phrases import split_texts
from xmodal.train.process.compilation_cache import enable_compilation_cache

_MOST_PARTS = 32  # names or texts in one request
_READS_TEXT = ('question', 'names', 'texts')  # kinds of queries


class BundleEngine(Engine):
  """Answers with a bundle's programs; batches have the sizes that they were exported with.

  Drawing has no steps to show.
  """

  def __init__(self, folder: str, name: str):
    """Loads a bundle; UserError if it cannot be read here."""
    enable_compilation_cache(least_seconds=0.0)
    folder = downloads.copy(folder) if storage.is_remote(folder) else folder
    try:
      self._model = load(folder)
    except BundleError as error:
      raise UserError(str(error)) from error
    about = self._model.about
    self.name, self.image_size = name, about['image_size']
    self.tasks = {task: _facts(own) for task, own in about['tasks'].items()}
    self.most_rows = max(size for own in about['tasks'].values() for one in own['programs']
                         for size in one['sizes'])

  def programs(self) -> Sequence[Callable[[], None]]:
    return [functools.partial(self._model.warm_up, task) for task in self.tasks]

  def answer(self, task, requests, on_step=None) -> list[dict[str, Any] | UserError]:
    found: list = [None] * len(requests)
    queries = {}
    for place, request in enumerate(requests):
      try:
        queries[place] = self._query(task, request)
      except UserError as error:
        found[place] = error
    for place, one in zip(queries, self._model.answer(task, list(queries.values()))):
      found[place] = UserError(str(one)) if isinstance(one, BundleError) else one
    return found

  def _query(self, task, request):
    options = {name: bytes(value) if isinstance(value, Picture) else value
               for name, value in request.options.items()}
    query = self._model.about['tasks'][task]['query']
    # Several pictures are ranked for one text, however many full stops it has.
    if query['kind'] == 'names' or query['kind'] == 'texts' and len(request.pictures) == 1:
      if (parts := len(split_texts(request.text, query.get('known', ())))) > _MOST_PARTS:
        raise UserError(f'the text has {parts} parts; wanted up to {_MOST_PARTS} in one request')
    pictures = list(request.pictures)  # with their pixels, see bundle.pixels.decode
    picture = pictures if len(pictures) > 1 else pictures[0] if pictures else None
    return picture, request.text, options | {'details': request.details}


def _facts(about) -> Facts:
  kind = about['query']['kind']
  return Facts(kind == 'drawing', kind == 'texts', kind in _READS_TEXT, tuple(about['options']))
