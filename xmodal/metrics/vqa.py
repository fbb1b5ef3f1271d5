"""VQA accuracy: agreement of an answer with people's answers.

Follows VQA: Visual Question Answering (Antol et al., ICCV 2015), section 5, and
its authors' evaluation code (GT-Vision-Lab/VQA, vqaEval.py), exactly as the code
does where it differs from the paper.
"""

import collections
from collections.abc import Sequence
import functools
import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {'none': '0'} | {
    word: str(number) for number, word in enumerate(
        'zero one two three four five six seven eight nine ten'.split())}
_ARTICLES = {'a', 'an', 'the'}

# The official table maps each of these words with one apostrophe missing to the
# full word. Its entries with capitals ("Im") can never match lower-cased text and
# are left out.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1:]: word
    for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": 'somebodyd'}  # reversed, as in the official table


@functools.lru_cache(maxsize=1 << 17)
def normalize_answer(text: str) -> str:
  """The official normal form: lower case, number words as digits, no articles, no punctuation.

  Note: 'A' becomes '', as an article does.
  """
  words = _strip_punctuation(_clean(text)).lower().split()
  words = [_NUMBERS.get(word, word) for word in words]
  return ' '.join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
  """Agreement of people with a prediction, 0..1.

  Each person is left out in turn; against the others the prediction scores
  min(1, matches / 3); the result is the mean over the people. As in the
  official code, both sides are normalised only if the answers differ: an answer
  that all people wrote identically (a sign, a brand) must match as written.

  The official code assumes ten answers. Here the same rule is used for four or
  more. With two or three answers, 3 is replaced by the number of the others, so
  that a unanimous answer scores 1; the result is then the share of people who
  gave the answer. With one answer, the normal forms must match exactly, because
  one person's spelling is not conclusive.

  Args:
    prediction: one answer.
    answers: people's answers, one entry per person.

  Raises:
    ValueError: no answers.
  """
  if not answers:
    raise ValueError('vqa_accuracy needs at least one answer to compare with, found none')
  if len(answers) == 1:
    return float(answer_key(prediction) == answer_key(answers[0]))
  form = _clean if len({_clean(answer) for answer in answers}) == 1 else normalize_answer
  prediction = form(prediction)
  return _agreement(sum(form(answer) == prediction for answer in answers), len(answers))


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
  """Soft targets: normalised answer -> its VQA accuracy, in the order of the answers.

  All spellings of an answer share one key, even if all people wrote the same
  ('t-shirt' has the key 't shirt'), although vqa_accuracy then requires their
  spelling: an answer list with 't-shirt' for this key is right in both cases. An
  article on its own ('A' of a multiple choice) is its own key, never ''.
  No answers give {}.
  """
  counts = collections.Counter(map(normalize_answer, answers))
  return {answer_key(answer): _agreement(counts[normalize_answer(answer)], len(answers))
          for answer in answers}


@functools.cache
def _agreement(matches, people):
  """min(1, matches among the others / 3), averaged over leaving each person out."""
  if people == 1:
    return float(matches)
  needed = min(3, people - 1)
  left_out_agrees = matches * min(1, (matches - 1) / needed)
  left_out_differs = (people - matches) * min(1, matches / needed)
  return (left_out_agrees + left_out_differs) / people


@functools.lru_cache(maxsize=1 << 17)
def _clean(text):
  return text.replace('\n', ' ').replace('\t', ' ').strip()


@functools.lru_cache(maxsize=1 << 17)
def answer_key(text: str) -> str:
  """Key shared by all spellings of an answer: the normal form, or the text if that is empty."""
  return normalize_answer(text) or _clean(text).lower()


def _strip_punctuation(text):
  """Drops marks next to a space and turns others into a space; drops all if it has '1,000'."""
  has_number_comma = re.search(r'\d,\d', text)
  stripped = text
  for mark in _PUNCTUATION:
    if mark in text:
      drop = has_number_comma or f'{mark} ' in text or f' {mark}' in text
      stripped = stripped.replace(mark, '' if drop else ' ')
  # The official pattern intends a lookbehind for a digit but tests for a literal
  # '<=', which never occurs; and it passes re.UNICODE as the count, so that at most
  # 32 full stops are removed.
  return re.sub(r'\.(?!\d)', '', stripped, count=int(re.UNICODE))
