"""Checks by words alone whether an answer agrees with a caption of the same picture.

It knows English function words and numbers, but no grammar: a text is split into sentences, and
these into phrases, the words between function words ('a small red circle' is one, 'the dog on the
mat' are two). Whatever the caption does not name counts as absent, so that short captions agree
with every 'no'.
"""

import re

from xmodal.metrics.vqa import answer_key, normalize_answer
from xmodal.word_patterns import WORD

_WORD = re.compile(rf"{WORD}(?:['-]{WORD})*|[.;!?,]")
_ENDS = frozenset('.;!?')
_BETWEEN = frozenset(
    """, the this that these those it its he she they his her their you your i we our my any some
    and there here is are was were be been being am do does did has have had can could will would
    should may might in on at of to from with by for as what which who whom whose where when why how
    many much picture image photo photograph show shows shown showing see seen visible contain
    contains thing things object objects number""".split())
# Words that make single phrases of a question meaningless: 'a dog or a cat', 'no dog'.
_UNCLEAR = frozenset("or nor not no isn't aren't doesn't don't".split())
_PROPERTIES = frozenset('color colour shape size material'.split())
_NUMBERS = {'a': '1', 'an': '1', 'another': '1', 'no': '0'}


def agrees(question: str, answer: str, caption: str) -> bool | None:
  """Whether a caption supports an answer.

  - yes and no: 'yes' is supported if each phrase of the question lies within a phrase of the
    caption; otherwise 'no'.
  - a number, in a question with 'many' or 'number': it must equal the sum of the numbers before the
    counted thing, in the sentence of the caption with the largest sum.
  - a property ('color', 'shape', 'size', 'material'): a phrase of the caption that names the thing
    in question must contain the answer.
  - anything else: a phrase of the caption must contain the answer, in a sentence that has, in the
    question's order, all words that question and caption share ('the cat is left of the dog'
    describes the cat).

  Returns:
    None if the caption does not decide it: the answer to an open question is not in the caption,
    things are named without a number, the question has 'or' or a negation.
  """
  words = set(_WORD.findall(question.lower()))
  question_parts, sentences = _parts(question), _sentences(caption)
  by_sentence = [[phrase for phrase in sentence if phrase[0] != '0'] for sentence in sentences]
  present = [phrase for sentence in by_sentence for phrase in sentence]
  answer = answer_key(answer)
  if not question_parts or not any(sentences) or words & _UNCLEAR:
    return None
  if answer in ('yes', 'no'):
    return all(_any_has(present, part) for part in question_parts) == (answer == 'yes')
  if answer.isdecimal() and words & {'many', 'number'}:
    count = _count(question_parts[0], sentences)
    return None if count is None else str(count) == answer
  answer_words = [word for part in _parts(answer) for word in part]
  if not answer_words:
    return None
  if words & _PROPERTIES:
    things = [thing for part in question_parts
              if (thing := [w for w in part if w not in _PROPERTIES])]
    naming = [phrase for phrase in present if any(_has(phrase, thing) for thing in things)]
    return _any_has(naming, answer_words) if things else None
  named = [word for part in question_parts for word in part if _any_has(present, [word])]
  return any(_any_has(sentence, answer_words) and _in_order(sentence, named)
             for sentence in by_sentence) or None


def _sentences(text: str) -> list[list[list[str]]]:
  """Splits a text into sentences, phrases and words; a number begins a phrase, as digits."""
  sentences = [[[]]]
  for word in _WORD.findall(text.lower()):
    word = word.removesuffix("'s")
    number = _NUMBERS.get(word) or normalize_answer(word)
    if word in _ENDS:
      sentences.append([[]])
    elif word in _BETWEEN:
      sentences[-1].append([])
    elif number.isdecimal():
      sentences[-1].append([number])
    else:
      sentences[-1][-1].append(word)
  return [[phrase for phrase in sentence if phrase] for sentence in sentences]


def _parts(text):
  """The phrases of a question or answer, without each 1, which may come from an article."""
  phrases = (phrase for sentence in _sentences(text) for phrase in sentence)
  return [part for phrase in phrases if (part := [word for word in phrase if word != '1'])]


def _count(thing, sentences):
  """The count of a thing in the sentence with most; None if it is named but never with a number."""
  named = [[phrase for phrase in sentence if _has(phrase, thing)] for sentence in sentences]
  counts = [sum(int(phrase[0]) for phrase in phrases) for phrases in named
            if phrases and all(phrase[0].isdecimal() for phrase in phrases)]
  if not counts:
    return None if any(named) else 0
  return max(counts)


def _in_order(phrases, words):
  left = iter([word for phrase in phrases for word in phrase])
  return all(any(_same(word, other) for other in left) for word in words)


def _any_has(phrases, words):
  return any(_has(phrase, words) for phrase in phrases)


def _has(phrase, words):
  return all(any(_same(word, other) for other in phrase) for word in words)


def _same(one, other):
  """Whether two words are equal, or one is the plural of the other."""
  short, long = sorted((one, other), key=len)
  plurals = (short, f'{short}s', f'{short}es', f'{short[:-1]}ies' if short.endswith('y') else '')
  return long in plurals
