"""What vocabularies and notes on a data set are made from, gathered in one pass.

Tasks ask it instead of the examples, which may be millions that are read from disk. Texts are kept
as numbers in arrays, counts by what is counted.
"""

import array
import collections
from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import json
import operator
from typing import Any, BinaryIO
import zipfile

import numpy as np
import tokenizers

from xmodal import storage
from xmodal.data.english import foreign_text
from xmodal.data.example import DEFAULTS, Example
from xmodal.data.texts import number_text
from xmodal.data.tokenizer import Tokenizer, learned_tokenizer, tokenizer_of
from xmodal.data.uncollected import uncollected
from xmodal.data.words import Words
from xmodal.errors import UserError

_FORMAT = 2  # of files: raise it when what is gathered changes, or how texts become words
_ROWS = ('given', 'questions', 'captions')  # fields of an Overview
_ROWS_AT_ONCE = 1 << 18
_FIELDS = tuple(DEFAULTS)
_filled = operator.attrgetter(*_FIELDS)


class Ragged:
  """Rows of numbers, of any lengths.

  Attributes:
    numbers: int [N], those of all rows.
    lengths: int [R].
  """

  def __init__(self, numbers: Sequence[int], lengths: Sequence[int]):
    self.numbers, self.lengths = np.asarray(numbers), np.asarray(lengths)

  @functools.cached_property
  def _ends(self):
    return np.cumsum(self.lengths, dtype=np.int64)

  def row(self, number: int) -> np.ndarray:
    """The numbers of one row."""
    end = self._ends[number]
    return self.numbers[end - self.lengths[number]:end]

  def sums(self, values: np.ndarray) -> np.ndarray:
    """The sum of the values that each row's numbers have: int64 [R]."""
    sums = np.zeros(len(self.lengths), np.int64)
    for first in range(0, len(sums), _ROWS_AT_ONCE):
      lengths = self.lengths[first:first + _ROWS_AT_ONCE]
      start = int(self._ends[first]) - int(lengths[0])
      numbers = self.numbers[start:start + int(lengths.sum(dtype=np.int64))]
      rows = np.repeat(np.arange(len(lengths)), lengths)
      sums[first:first + len(lengths)] = np.bincount(rows, values[numbers], len(lengths))
    return sums


@dataclasses.dataclass
class Overview:
  """Counts over examples.

  Attributes:
    size: number of examples.
    words: word of xmodal.data.words -> how often it occurs in the texts.
    names: name -> number of objects that have it.
    num_objects: number of objects in an example -> number of such examples.
    ignored: number of objects to be ignored.
    categories: name -> its objects' numbers of a category -> number of objects that have it, in the
      order of the examples.
    answers: the different answers, in the order of the examples.
    given: by example, the place in `answers` of each of its answers.
    questions: by example, the places in `words` of the words of its question.
    captions: by caption, in the order of the examples, the places in `words` of its words; none for
      a blank caption.
    num_captions: number of captions of each example: int [N].
    numbers: the targets of regression, in the order of the examples: float64 [K].
    filled: (names of filled fields and inputs, number of such examples).
    foreign: number of examples that do not read as English, and the first such text; None: not
      counted.
    tokenizer: what learn_tokenizer gives for `size` tokens, with its `state`, and the `version` of
      the library that learned it; None: not learned.
  """

  size: int
  words: dict[str, int]
  names: collections.Counter[str]
  num_objects: collections.Counter[int]
  ignored: int
  categories: dict[str, collections.Counter]
  answers: list[str]
  given: Ragged
  questions: Ragged
  captions: Ragged
  num_captions: np.ndarray
  numbers: np.ndarray
  filled: list[tuple[list[str], int]]
  foreign: tuple[int, str] | None = None
  tokenizer: dict[str, Any] | None = None

  def __len__(self) -> int:
    return self.size

  def count(self, *fields: str) -> int:
    """Number of examples in which all these are filled, see Example.has."""
    return sum(count for there, count in self.filled if set(fields) <= set(there))

  def save(self, file: BinaryIO, of: str) -> None:
    """Writes all of it.

    Args:
      file: open binary file.
      of: fingerprint of the examples.
    """
    facts = {
        field.name: value for field in dataclasses.fields(self)
        if not isinstance(value := getattr(self, field.name), Ragged | np.ndarray)}
    facts |= {'format': _FORMAT, 'of': of, 'words': list(self.words),
              'num_objects': list(self.num_objects.items()),
              'categories': [(name, list(numbers.items()))
                             for name, numbers in self.categories.items()]}
    content = json.dumps(facts, default=np.generic.item).encode()
    np.savez(file, facts=np.frombuffer(content, np.uint8),
             words=np.array(list(self.words.values()), np.int64),
             num_captions=self.num_captions, numbers=self.numbers,
             **{f'{name}_{part}': getattr(getattr(self, name), part)
                for name in _ROWS for part in ('numbers', 'lengths')})

  @classmethod
  def load(cls, path: str, of: str) -> 'Overview | None':
    """Reads what `save` wrote; None if the file is missing, damaged, of another version of this
    program, or of other examples."""
    try:
      with storage.open_file(path, 'rb') as f, np.load(f) as kept:
        facts = json.loads(kept['facts'].tobytes())
        if (facts.pop('format'), facts.pop('of')) != (_FORMAT, of):
          return None
        arrays = {name: kept[name] for name in kept.files if name != 'facts'}
      return cls(**facts | {
          'words': dict(zip(facts['words'], arrays['words'].tolist(), strict=True)),
          'names': collections.Counter(facts['names']),
          'num_objects': collections.Counter(dict(facts['num_objects'])),
          'categories': {name: collections.Counter(dict(numbers))
                         for name, numbers in facts['categories']},
          **{name: Ragged(arrays[f'{name}_numbers'], arrays[f'{name}_lengths']) for name in _ROWS},
          **{name: arrays[name] for name in ('num_captions', 'numbers')},
          'filled': [(fields, count) for fields, count in facts['filled']],
          'foreign': facts['foreign'] and tuple(facts['foreign'])})
    except UserError:
      raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
      return None


class Gathering:
  """Makes an Overview of the examples that are added."""

  def __init__(self, languages: bool = False):
    """languages: whether to count examples that do not read as English."""
    self._size, self._ignored = 0, 0
    self._foreign = (0, '') if languages else None
    self._filled, self._names, self._num_objects, self._with_name = (
        collections.Counter() for _ in range(4))
    self._categories: dict[str, collections.Counter] = {}
    self._answers: dict[str, int] = {}
    self._words, self._counts = Words(), collections.Counter()
    self._given, self._questions, self._captions = (array.array('i') for _ in range(3))
    self._num_given, self._num_words, self._num_captions, self._caption_words = (
        array.array('i') for _ in range(4))
    self._numbers = array.array('d')

  def add(self, example: Example, times: int = 1) -> None:
    """Adds an example after those before, or several equal ones."""
    self._size += times
    inputs = [name for name in example.inputs or () if name not in DEFAULTS]
    self._filled[(*map(operator.ne, _filled(example), DEFAULTS.values()), *inputs)] += times
    words = self._words.numbers(example.question) if example.question else []
    self._questions.extend(words * times)
    self._num_words.extend([len(words)] * times)
    known = self._answers
    try:
      given = [known[answer] for answer in example.answers]
    except KeyError:
      given = [known.setdefault(answer, len(known)) for answer in example.answers]
    self._given.extend(given * times)
    self._num_given.extend([len(given)] * times)
    for caption in example.captions * times:
      words = self._words.numbers(caption)
      if not caption.strip():
        self._counts.update(words)
        words = ()
      self._captions.extend(words)
      self._caption_words.append(len(words))
    self._num_captions.extend([len(example.captions)] * times)
    if example.expression is not None:
      self._counts.update(self._words.numbers(example.expression.name) * times)
    if example.number is not None:
      self._numbers.extend([example.number] * times)
    if example.objects is not None:
      self._add_objects(example.objects, times)
    if self._foreign is not None and (text := foreign_text(example)) is not None:
      self._foreign = self._foreign[0] + times, self._foreign[1] or text

  def add_expressions(self, texts: Iterable[str]) -> None:
    """Adds the texts of expressions, whose examples were added with '' for each.

    Args:
      texts: with single spaces between words, and none before and after.
    """
    for is_ascii, some in itertools.groupby(texts, str.isascii):
      if not is_ascii:
        for text in some:
          self._counts.update(self._words.numbers(text))
        continue
      # Single spaces divide such texts into parts that are read alone.
      parts = collections.Counter(itertools.chain.from_iterable(map(str.split, some)))
      for part, count in parts.items():
        for number in self._words.numbers(part):
          self._counts[number] += count

  def _add_objects(self, objects, times):
    names = [thing.name for thing in objects]
    self._num_objects[len(names)] += times
    for counts, of_example in ((self._names, names), (self._with_name, dict.fromkeys(names))):
      if times == 1:
        counts.update(list(of_example))
      else:
        for name in of_example:
          counts[name] += times
    for thing in objects:
      self._ignored += bool(thing.ignore) * times
      if thing.category_id is not None:
        self._categories.setdefault(
            thing.name, collections.Counter())[thing.category_id] += times

  def overview(self) -> Overview:
    """The overview; nothing can be added to it."""
    given, questions, captions = (Ragged(_smallest(numbers), _smallest(lengths))
                                  for numbers, lengths in (
        (self._given, self._num_given), (self._questions, self._num_words),
        (self._captions, self._caption_words)))
    counts = self._counts
    for texts in (questions, captions):
      for number, count in enumerate(np.bincount(texts.numbers).tolist()):
        counts[number] += count
    numbers = collections.Counter(map(number_text, self._numbers))
    answers = np.bincount(given.numbers, minlength=len(self._answers)).tolist()
    for texts in (zip(self._answers, answers), self._with_name.items(), numbers.items()):
      for text, count in texts:
        for number in self._words.numbers(text):
          counts[number] += count
    # By number, so that `questions` holds places.
    words = {word: counts[number] for number, word in enumerate(self._words.words)}
    fields = len(_FIELDS)
    filled = [([*itertools.compress(_FIELDS, key[:fields]), *key[fields:]], count)
              for key, count in self._filled.items()]
    return Overview(self._size, words, self._names, self._num_objects, self._ignored,
                    self._categories, list(self._answers), given, questions, captions,
                    _smallest(self._num_captions), np.asarray(self._numbers), filled,
                    self._foreign)


def _smallest(numbers):
  """An array of the smallest type that holds its numbers."""
  found = np.asarray(numbers)
  return found.astype(np.min_scalar_type(int(found.max(initial=0))))


def overview_of(examples: Iterable[Example]) -> Overview:
  """The overview of examples, their own if they have one."""
  own = getattr(examples, 'overview', None)
  return gathered(examples) if own is None else own


@uncollected()
def gathered(examples: Iterable[Example], languages: bool = False) -> Overview:
  """The overview of examples, from a pass over them all; languages: see Gathering."""
  gathering = Gathering(languages)
  for example in examples:
    gathering.add(example)
  return gathering.overview()


def learn_tokenizer(overviews: Sequence[Overview], vocab_size: int) -> Tokenizer:
  """The tokenizer that train_tokenizer learns from the texts of all these."""
  if len(overviews) == 1 and (kept := overviews[0].tokenizer) and (
      kept['size'], kept['version']) == (vocab_size, tokenizers.__version__):
    return learned_tokenizer(tokenizers.Tokenizer.from_str(kept['state']))
  counts = collections.Counter()
  for overview in overviews:
    counts.update(overview.words)
  return tokenizer_of(counts, vocab_size)


def with_tokenizer(overview: Overview, vocab_size: int) -> Overview:
  """The overview with the tokenizer for its texts alone."""
  state = learn_tokenizer([overview], vocab_size).state
  return dataclasses.replace(overview, tokenizer={
      'size': vocab_size, 'version': tokenizers.__version__, 'state': state})


class Sampled(Sequence[Example]):
  """Examples with their overview, which is made once, on first use.

  Other attributes are those of the examples.
  """

  def __init__(self, examples: Sequence[Example], overview: Overview | None = None):
    self._examples, self._own = examples, overview

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    return self._examples[index]

  def __iter__(self):
    return iter(self._examples)

  def __getattr__(self, name: str) -> Any:
    if name == '_examples':
      raise AttributeError(name)
    return getattr(self._examples, name)

  @functools.cached_property
  def overview(self) -> Overview:
    return self._own or overview_of(self._examples)
