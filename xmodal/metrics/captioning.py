"""Scores of captions: BLEU, ROUGE-L, CIDEr and METEOR, as COCO's evaluation defines them.

Follows Microsoft COCO Captions (arXiv:1504.00325) and its authors' code
(tylin/coco-caption, on PyPI as pycocoevalcap). That package is 104 MB and tokenizes
with a Java program, so everything except METEOR is implemented here. METEOR is itself
a Java program, and is available if that package and Java are installed.
"""

import collections
from collections.abc import Sequence
import importlib.util
import math
import re
import shutil

import numpy as np

from xmodal.word_patterns import FORMATS, MARKS, WORD

_ORDER = 4  # length of the longest n-grams
_SIGMA = 6.0  # width of CIDEr's penalty on length differences, in 2-grams
_BETA = 1.2  # weight of recall relative to precision in ROUGE-L

_ABBREVIATIONS = 'mr mrs ms dr prof st mt ft jr sr vs etc inc ltd co corp ave blvd rd gen lt col al'
# Words without an apostrophe that the Treebank splits.
_TWO_WORDS = {'cannot': 'can not', 'gonna': 'gon na', 'gotta': 'got ta', 'wanna': 'wan na',
              'gimme': 'gim me', 'lemme': 'lem me'}
_BRACKETS = {'(': '-lrb-', ')': '-rrb-', '[': '-lsb-', ']': '-rsb-', '{': '-lcb-', '}': '-rcb-'}
_TOKEN = re.compile(rf"""
    (?:{'|'.join(_ABBREVIATIONS.split())})\.(?![^\W_])       # mr.
  | no\.(?=\s\d)
  | [^\W\d_](?:\.[^\W\d_])*\.(?![^\W_])                     # a.m.
  | [^\W_]+(?=n't(?!\w))                                     # is|n't
  | n't(?!\w)
  | '(?:s|m|d|re|ve|ll)(?!\w)
  | '(?:em|n'|\d\ds?)(?!\w)
  | ma'am(?!\w) | c'est(?!\w) | y'(?=all) | j'(?=[^\W\d_])
  | (?<!')[dlno]'(?!\d){WORD}(?:-{WORD})*                    # o'clock, l'homme
  | [^\W\d_]+[aeiouy]'(?=[aeiou]){WORD}(?:-{WORD})*          # qu'il
  | (?:(?<![^\s(])[-+]?\.?)?\d+(?:[.,:/]\d+)*(?![-./]?\w)    # 10:30, 1,000, -.5
  | {WORD}(?:[-._/]{WORD})*                                  # t-shirt
  | [^\w\s{MARKS}{FORMATS}\U00010000-\U0010ffff]
""", re.VERBOSE)
_DROPPED = frozenset("'`\".?!,:-;\N{HORIZONTAL ELLIPSIS}\N{EN DASH}\N{EM DASH}"
                     '\u00ab\u00bb\u2039\u203a')  # guillemets
_REPLACED = str.maketrans('\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}'
                          '\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}',
                          "''\"\"", '\N{SOFT HYPHEN}')


def tokenize(text: str) -> list[str]:
  """Lower-case words without punctuation, as the Penn Treebank splits them ("is n't").

  On ordinary captions these are the tokens of coco-caption, which calls Stanford's
  PTBTokenizer; on 20,000 lines of software documentation 99.4% were equal (all but web
  addresses, file names and versions). A bracket remains a token ('-lrb-'), as there.

  Words of other languages also match PTBTokenizer, with their vowel signs and accents,
  in the scripts that it fully supports. It drops some or all vowel signs of Kannada,
  Malayalam, Sinhala, Gurmukhi, Khmer, Burmese and Tibetan; they are kept here.
  Chinese, Japanese and Thai are split at spaces and punctuation only, as there.
  """
  tokens = []
  for token in _TOKEN.findall(text.lower().translate(_REPLACED)):
    if token not in _DROPPED:
      tokens += _TWO_WORDS.get(token, _BRACKETS.get(token, token)).split()
  return tokens


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]
                   ) -> dict[str, float]:
  """Scores of N captions as in coco-caption, and the share of exact matches.

  Args:
    captions: N captions, one per picture.
    references: N lists of captions by people, at least one per picture.

  Returns:
    BLEU-1 to BLEU-4, ROUGE-L and METEOR (if available, see `meteor`), 0..1; CIDEr,
    0..10, which weights n-grams by their rarity over pictures and is 0 for a single
    picture; exact, the share of captions that equal a reference except for case
    and punctuation.

  Raises:
    ValueError: no captions, another number of references, or a picture without one.
  """
  if not captions or len(captions) != len(references) or not all(references):
    raise ValueError(f'wanted captions and for each of them a reference or more, found '
                     f'{len(captions)} captions and references of {len(references)} pictures')
  ours = [tokenize(text) for text in captions]
  theirs = [[tokenize(text) for text in texts] for texts in references]
  scores = {f'BLEU-{n}': score for n, score in enumerate(bleu(ours, theirs), 1)}
  scores |= {'ROUGE-L': rouge_l(ours, theirs), 'CIDEr': cider(ours, theirs)}
  if (score := meteor(ours, theirs)) is not None:
    scores['METEOR'] = score
  # A caption without words is wrong, even if a reference has none either.
  return scores | {'exact': float(np.mean([bool(words) and words in texts
                                           for words, texts in zip(ours, theirs)]))}


def bleu(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> list[float]:
  """BLEU-1 to BLEU-4 of the corpus (Papineni et al., ACL 2002).

  The brevity penalty uses the length of the reference nearest in length. Arguments as in
  caption_scores, tokenized.
  """
  correct, guessed, length, wanted = np.zeros(_ORDER), np.zeros(_ORDER), 0, 0
  for words, texts in zip(captions, references):
    known = collections.Counter()
    for text in texts:
      known |= _ngrams(text)  # the largest count in any text
    for ngram, count in _ngrams(words).items():
      correct[len(ngram) - 1] += min(count, known[ngram])
    guessed += [max(0, len(words) - n) for n in range(_ORDER)]
    length += len(words)
    wanted += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
  # The constants avoid division by 0 as in the official code.
  precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9)) ** (1 / np.arange(1, _ORDER + 1))
  ratio = (length + 1e-15) / (wanted + 1e-9)
  return (precision * math.exp(min(0, 1 - 1 / ratio))).tolist()


def rouge_l(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
  """ROUGE-L (Lin, 2004), the mean over captions; arguments as in caption_scores, tokenized."""
  scores = []
  for words, texts in zip(captions, references):
    common = [_longest_common(words, text) for text in texts]
    # A text without words counts as one word, as in the official code.
    precision = max(common) / max(len(words), 1)
    recall = max(found / max(len(text), 1) for found, text in zip(common, texts))
    below = recall + _BETA ** 2 * precision
    scores.append((1 + _BETA ** 2) * precision * recall / below if below else 0.0)
  return float(np.mean(scores))


def _longest_common(one, other):
  """Length of the longest common subsequence."""
  row = [0] * (len(other) + 1)
  for word in one:
    before, row = row, [0]
    for k, also in enumerate(other):
      row.append(before[k] + 1 if word == also else max(row[k], before[k + 1]))
  return row[-1]


def cider(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
  """CIDEr (arXiv:1411.5726), 0..10, with the official code's clipping and length penalty (CIDEr-D).

  Arguments as in caption_scores, tokenized.
  """
  counts = [[_ngrams(text) for text in texts] for texts in references]
  pictures = collections.Counter(ngram for texts in counts for ngram in set().union(*texts))
  scores = []
  for words, texts in zip(captions, counts):
    ours = _TfIdf(_ngrams(words), pictures, len(captions))
    theirs = (_TfIdf(text, pictures, len(captions)) for text in texts)
    scores.append(np.mean([ours.likeness(text) for text in theirs]))
  return 10 * float(np.mean(scores))


class _TfIdf:
  """A text's n-grams with TF-IDF weights: count times log(pictures / pictures with the n-gram)."""

  def __init__(self, counts, pictures, total):
    self._weights = {ngram: count * (math.log(total) - math.log(max(pictures[ngram], 1)))
                     for ngram, count in counts.items()}
    self._length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
    squares = np.zeros(_ORDER)
    for ngram, weight in self._weights.items():
      squares[len(ngram) - 1] += weight ** 2
    self._norm = np.sqrt(squares)

  def likeness(self, other):
    """Cosine similarity, averaged over n, times a penalty for a difference in length."""
    common = np.zeros(_ORDER)
    for ngram, weight in self._weights.items():
      there = other._weights.get(ngram, 0.0)
      common[len(ngram) - 1] += min(weight, there) * there
    norms = self._norm * other._norm
    common = np.divide(common, norms, out=common, where=norms > 0)
    return common.mean() * math.exp(-(self._length - other._length) ** 2 / (2 * _SIGMA ** 2))


def _ngrams(words):
  return collections.Counter(tuple(words[i:i + n]) for n in range(1, _ORDER + 1)
                             for i in range(len(words) - n + 1))


def meteor(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]
           ) -> float | None:
  """METEOR 1.5 (Denkowski and Lavie, 2014), 0..1; arguments as in caption_scores, tokenized.

  None if pycocoevalcap, which contains its Java program, is not installed, or if
  no suitable Java is.
  """
  if not (importlib.util.find_spec('pycocoevalcap') and shutil.which('java')):
    return None
  from pycocoevalcap.meteor.meteor import Meteor
  found = {i: [' '.join(words)] for i, words in enumerate(captions)}
  known = {i: [' '.join(text) for text in texts] for i, texts in enumerate(references)}
  try:
    return Meteor().compute_score(known, found)[0]
  except (OSError, ValueError):  # Java is too old, or cannot get the 2 GB it requests
    return None
