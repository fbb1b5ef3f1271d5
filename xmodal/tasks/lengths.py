"""Numbers of tokens of a data set's texts, and notes on texts that are cut."""

from collections.abc import Iterable, Sequence
import itertools

import numpy as np

from xmodal.data.example import Example
from xmodal.data.overview import Overview, Ragged, overview_of
from xmodal.data.tokenizer import Tokenizer

_AT_ONCE = 1 << 14  # texts that are encoded together


def token_counts(tokenizer: Tokenizer, overview: Overview, rows: Ragged, texts: Iterable[str]
                 ) -> np.ndarray:
  """Number of tokens of each text, with its end: int64 [N].

  Args:
    tokenizer: of the model.
    overview: of the examples.
    rows: the places in overview.words of each text's words.
    texts: the texts; read if the tokenizer does not divide words as the overview does.
  """
  if (of_words := tokenizer.word_lengths(list(overview.words))) is not None:
    return rows.sums(of_words) + 1
  texts, found = iter(texts), [np.zeros(0, np.int64)]
  while some := list(itertools.islice(texts, _AT_ONCE)):
    found.append(tokenizer.lengths(some))
  return np.concatenate(found)


def question_counts(tokenizer: Tokenizer, examples: Sequence[Example]) -> np.ndarray:
  """Number of tokens of each question: int64 [N]."""
  overview = overview_of(examples)
  there = overview.questions.lengths > 0
  texts = (e.question for e in examples)
  return token_counts(tokenizer, overview, overview.questions, texts)[there]


def caption_counts(tokenizer: Tokenizer, examples: Sequence[Example], most: int | None = None
                   ) -> np.ndarray:
  """Number of tokens of each caption, of the first `most` of each example: int64 [N].

  Blank captions are left out.
  """
  overview = overview_of(examples)
  counts = token_counts(tokenizer, overview, overview.captions, (
      text for e in examples for text in e.captions))[overview.captions.lengths > 0]
  if most is None:
    return counts
  own = num_captions(overview)
  places = np.arange(len(counts)) - np.repeat(np.cumsum(own) - own, own)  # within the example
  return counts[places < most]


def num_captions(overview: Overview) -> np.ndarray:
  """Number of captions of each example that are not blank: int64 [N]."""
  owners = np.repeat(np.arange(overview.size), overview.num_captions)
  return np.bincount(owners[overview.captions.lengths > 0], minlength=overview.size)


def length_note(lengths: np.ndarray, kind: str, limit: int, key: str) -> list[str]:
  """One line if any of the texts' numbers of tokens is above `limit`, the value of config.`key`."""
  if not (cut := int((lengths > limit).sum())):
    return []
  return [f'{cut} of {len(lengths)} {kind} are longer than {limit} tokens (the longest has '
          f'{lengths.max()}) and lose their end: config.{key} sets the limit']
