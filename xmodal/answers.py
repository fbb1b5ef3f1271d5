"""Answers to any number of questions, a batch at a time."""

import collections
from collections.abc import Iterable, Iterator
import itertools
from typing import Any

from xmodal.data.example import Example
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.errors import UserError
from xmodal.predictor import AT_ONCE, Predictor
from xmodal.tasks.task import Task

Query = tuple[Task, list[Example]]  # as Task.query gives it


def answers(predictor: Predictor, opened: DecodedPictures, queries: Iterable[Query], *,
            fixed: bool = True) -> Iterator[Any | UserError]:
  """Yields the answer to each query in order, and reads no more than AT_ONCE queries ahead.

  The pictures of a batch are opened in threads. Queries whose tasks have equal batch_key share a
  batch: those of most tasks always, those of detection with the same names.

  Args:
    predictor: its `decode` is `opened`.
    opened: what pictures are opened with.
    queries: see Task.query.
    fixed: whether a batch of queries with one batch_key is filled up to AT_ONCE, so that one
      program serves any number of them.

  Yields:
    The task's prediction, or a UserError where a picture of the query cannot be read.
  """
  queries = iter(queries)
  try:
    while some := list(itertools.islice(queries, AT_ONCE)):
      yield from _answer(predictor, opened, some, fixed)
  finally:
    opened.open((), 0)  # the file may change before the next query


def _answer(predictor, opened, queries, fixed):
  paths = dict.fromkeys(
      e.image for _, examples in queries for e in examples if isinstance(e.image, str))
  wrong = opened.open(list(paths), predictor.config.data.image_size)
  found, alike = [None] * len(queries), collections.defaultdict(list)
  for place, (task, examples) in enumerate(queries):
    reasons = [wrong[e.image] for e in examples if isinstance(e.image, str) and e.image in wrong]
    if reasons:
      found[place] = UserError(reasons[0])
    else:
      alike[task.name, task.batch_key].append(place)
  for places in alike.values():
    batches = predictor.batches([e for place in places for e in queries[place][1]],
                                queries[places[0]][0], fixed=fixed and len(alike) == 1)
    predictions = (prediction for _, some in batches for prediction in some)
    for place in places:
      task, examples = queries[place]
      own = list(itertools.islice(predictions, len(examples)))
      # Of one query of a task that draws there is one picture.
      found[place] = own[0] if task.draws else task.join(examples, own)
  return found
