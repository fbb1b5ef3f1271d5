"""The engine on a run's checkpoint."""

import collections
from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
import numpy as np

from xmodal.data.pictures import images
from xmodal.errors import UserError
from xmodal.predictor import AT_ONCE, Predictor
from xmodal.serve.engine import Engine, Facts, OnStep, Picture, Request
from xmodal.train.process.compilation_cache import enable_compilation_cache
from xmodal.trained import without_flags

# Texts that compile the usual program of each task; other tasks get the last one.
_TEXTS = {'detection': 'circle.', 'retrieval': 'a circle.', 'captioning': '', 'objects': ''}
_ANY_TEXT = 'what is it?'
_MOST_PARTS = 32  # names or texts in one request: each power of two of them is a program


class TrainedEngine(Engine):
  """Answers with a Predictor.

  Batches have fixed sizes. On a CPU a program of one row rounds otherwise than one of several
  rows, in the last bits. At small widths all programs of two rows or more agree: so the sizes begin
  with 2, and an answer does not depend on what else is in its batch. At large widths it may, in the
  last bits; see README.md.
  """

  def __init__(self, folder: str, sizes: Sequence[int], name: str, precision: str = ''):
    enable_compilation_cache(least_seconds=0.0)
    # The steps of a drawing read arrays while its program runs, which may deadlock with it on. Each
    # answer is waited for anyway.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    self.name, self._sizes, self.most_rows = name, tuple(sizes), AT_ONCE
    self._predictor = Predictor(folder, _decode, precision)
    self.image_size = self._predictor.config.data.image_size
    self.tasks = {name: _facts(task) for name, task in self._predictor.tasks.items()}
    self._on_step: OnStep | None = None
    self._unfinished, self._steps = None, 0

  def programs(self) -> list[Callable[[], None]]:
    pixels = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    picture = Picture(b'', images.decode(pixels, pixels.shape[:2]))
    found = []
    for name, facts in self.tasks.items():
      request = Request(() if facts.draws else (picture,), _TEXTS.get(name, _ANY_TEXT))
      if facts.draws:
        found.append(functools.partial(self._warm, name, [request]))
        continue
      found += [functools.partial(self._warm, name, [request] * size) for size in self._sizes]
      if facts.writes:
        found.append(functools.partial(self._warm, name, [request], lambda *_: None))
      if facts.ranks:  # several pictures for a text are another program
        found += [functools.partial(self._warm, name, [Request((picture,) * size, request.text)])
                  for size in self._sizes]
    return found

  def _warm(self, name, requests, on_step=None):
    for answer in self.answer(name, requests, on_step):
      if isinstance(answer, UserError):
        raise answer

  def answer(self, task, requests, on_step=None):
    own = self._predictor.task(task)
    found: list[dict | UserError | None] = [None] * len(requests)
    queries, alike = {}, collections.defaultdict(list)
    for place, request in enumerate(requests):
      try:
        queries[place] = self._query(own, request, on_step is not None)
        alike[queries[place][0].batch_key].append(place)
      except UserError as error:
        found[place] = UserError(without_flags(str(error)))
    # Pictures that are drawn for one text may have settings of their own.
    groups = [[place] for place in queries] if own.draws else alike.values()
    self._on_step, self._unfinished = on_step, own.unfinished
    try:
      for places in groups:
        answers = self._answer_alike([queries[place] for place in places])
        for place, answer in zip(places, answers, strict=True):
          found[place] = self._plain(queries[place], answer, requests[place].details)
    finally:
      self._on_step = None
    return found

  def _query(self, task, request, streamed):
    """The result of Task.query: the task, changed by the query, and the examples."""
    if not request.pictures and not task.draws:
      raise UserError(f'there is no picture; {task.name} wants one')
    if len(request.pictures) > 1 and not task.takes_folders:
      raise UserError(f'{len(request.pictures)} pictures; {task.name} wants one in each request')
    if task.takes_folders and not request.text.strip():
      raise UserError(f'text is empty; {task.name} wants one to compare')
    if unknown := sorted(set(request.options) - set(self.tasks[task.name].options)):
      wanted = ', '.join(self.tasks[task.name].options) or 'none'
      raise UserError(f'{unknown[0]} means nothing to {task.name}; its options: {wanted}')
    image = request.pictures[0] if request.pictures else None
    if len(request.pictures) > 1:
      image = list(request.pictures)
    options = dict(request.options)
    # A drawing has its steps always, so that there is one program of it. A text has them only where
    # they are wanted, because they take time.
    if 'progress' in task.query_options and (task.draws or streamed):
      options['progress'] = self._begin
    queried, examples = task.query(image, request.text, **options)
    names = queried.vocabulary()
    parts = max(0 if names is None else len(names.tokens),
                0 if task.takes_folders else len(examples),
                max((len(e.captions) for e in examples), default=0))
    if parts > _MOST_PARTS and not task.draws:
      raise UserError(f'the text has {parts} parts; wanted up to {_MOST_PARTS} in one request')
    return queried, examples

  def _answer_alike(self, queries):
    """Predictions for queries that can share a batch."""
    examples = [example for _, some in queries for example in some]
    task = queries[0][0]
    batches = self._predictor.batches(examples, task, sizes=self._sizes)
    predictions = (prediction for _, some in batches for prediction in some)
    for own, some in queries:
      found = list(itertools.islice(predictions, len(some)))
      yield found if own.draws else own.join(some, found)
    jax.effects_barrier()  # the last step's report

  def _plain(self, query, answer, details) -> dict[str, Any]:
    task, examples = query
    if task.draws and len(answer) > 1:
      line = {'pictures': [task.plain(one) for one in answer]}
    else:
      answer = answer[0] if task.draws else answer
      line = task.plain(answer)
      if details:
        line |= task.details(answer)
    if notes := list(dict.fromkeys(n for example in examples for n in task.notes(example))):
      line['notes'] = [without_flags(note) for note in notes]
    return line

  def _begin(self, steps):
    self._steps = steps
    return self._report  # bound methods are equal, so that programs are found again

  def _report(self, step, value):
    if self._on_step is not None:
      self._on_step(int(step), self._steps, self._unfinished(np.asarray(value)))


def _facts(task) -> Facts:
  return Facts(task.draws, task.takes_folders,
               'question' in task.needs or task.takes_folders or task.name == 'detection',
               tuple(name for name in task.query_options if name != 'progress'),
               writes='progress' in task.query_options and not task.draws)


def _decode(source, size):
  return source.decoded if isinstance(source, Picture) else images.decode(source, size)
