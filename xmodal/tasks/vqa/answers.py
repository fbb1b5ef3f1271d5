"""The answers that a data set gives: the commonest of a question, and the list of a classifier."""

import collections
from collections.abc import Sequence

import numpy as np

from xmodal.data.example import Example
from xmodal.data.overview import overview_of
from xmodal.errors import UserError
from xmodal.metrics import vqa as vqa_metric


def commonest(answers: Sequence[str]) -> str:
  """The most frequent answer, in its most frequent spelling."""
  keys = collections.Counter(map(vqa_metric.answer_key, answers))
  key = keys.most_common(1)[0][0]
  spellings = collections.Counter(a.strip() for a in answers if vqa_metric.answer_key(a) == key)
  return spellings.most_common(1)[0][0]


def make_answer_list(examples: Sequence[Example], size: int) -> tuple[str, ...]:
  """The `size` most frequent answers, each in its most frequent spelling, most frequent first.

  Raises:
    UserError: no example has an answer.
  """
  overview = overview_of(examples)
  if not overview.answers:
    raise UserError(f'vqa: none of {len(examples)} training examples has an answer; it needs the '
                    'field "answers"')
  places, spellings = {}, collections.defaultdict(collections.Counter)
  keys = np.array([places.setdefault(vqa_metric.answer_key(answer), len(places))
                   for answer in overview.answers])
  given = overview.given
  for answer, place, count in zip(overview.answers, keys.tolist(),
                                  np.bincount(given.numbers).tolist()):
    spellings[place][answer.strip().lower()] += count
  # One vote per question: an answer given by one of ten people counts a tenth.
  shares = np.repeat(1 / np.maximum(given.lengths, 1), given.lengths)
  votes = dict(zip(places, np.bincount(keys[given.numbers], shares).tolist()))
  ranked = sorted(votes, key=lambda key: (-round(votes[key], 6), key))
  return tuple(spellings[places[key]].most_common(1)[0][0] for key in ranked[:size])
