"""Whether an answer agrees with a caption of the same picture, by the words of both.

It knows English function words and numbers, and no grammar: a text falls into sentences, and these
into phrases, the words between function words ('a small red circle' is one, 'the dog on the mat'
are two). What the caption does not name counts as not there, so that captions that tell little
agree with every 'no'.
"""

import re

from xmodal.letters import WORD
from xmodal.metrics.vqa import answer_key, normalize_answer

_WORD = re.compile(rf"{WORD}(?:['-]{WORD})*|[.;!?,]")
_ENDS = frozenset('.;!?')
_BETWEEN = frozenset(
    """, the this that these those it its he she they his her their you your i we our my any some
    and there here is are was were be been being am do does did has have had can could will would
    should may might in on at of to from with by for as what which who whom whose where when why how
    many much picture image photo photograph show shows shown showing see seen visible contain
    contains thing things object objects number""".split())
# Of these no part can be looked up by itself: 'a dog or a cat', 'no dog'.
_UNCLEAR = frozenset("or nor not no isn't aren't doesn't don't".split())
_PROPERTIES = frozenset('color colour shape size material'.split())
_NUMBERS = {'a': '1', 'an': '1', 'another': '1', 'no': '0'}


def agrees(question: str, answer: str, caption: str) -> bool | None:
  """Whether a caption bears an answer out.

  - yes and no: whether each phrase of the question stands within a phrase of the caption.
  - a number, asked for by 'how many' or 'number': the sum of the numbers before what is counted, in
    the sentence of the caption that has most of it.
  - a property ('color', 'shape', 'size', 'material'): whether the answer stands in a phrase of the
    caption that names the thing asked about.
  - anything else: whether the answer stands within a phrase of the caption, in a sentence that has
    all words of the question that the caption has, in the question's order ('the cat is left of the
    dog' tells of the cat).

  Returns:
    None if the caption says nothing of it or the words do not tell: the answer to an open question
    is not in the caption, things are named without a number, the question has 'or' or a negation.
  """
  words = set(_WORD.findall(question.lower()))
  asked, sentences = _parts(question), _sentences(caption)
  there = [[phrase for phrase in sentence if phrase[0] != '0'] for sentence in sentences]
  told = [phrase for sentence in there for phrase in sentence]
  answer = answer_key(answer)
  if not asked or not any(sentences) or words & _UNCLEAR:
    return None
  if answer in ('yes', 'no'):
    return all(_any_has(told, part) for part in asked) == (answer == 'yes')
  if answer.isdecimal() and words & {'many', 'number'}:
    count = _count(asked[0], sentences)
    return None if count is None else str(count) == answer
  wanted = [word for part in _parts(answer) for word in part]
  if not wanted:
    return None
  if words & _PROPERTIES:
    things = [thing for part in asked if (thing := [w for w in part if w not in _PROPERTIES])]
    naming = [phrase for phrase in told if any(_has(phrase, thing) for thing in things)]
    return _any_has(naming, wanted) if things else None
  named = [word for part in asked for word in part if _any_has(told, [word])]
  return any(_any_has(sentence, wanted) and _in_order(sentence, named)
             for sentence in there) or None


def _sentences(text: str) -> list[list[list[str]]]:
  """The sentences of a text, of each its phrases, of each its words, a number first, as digits."""
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
  """The phrases of a text that is looked up, without a 1, which may be an article."""
  phrases = (phrase for sentence in _sentences(text) for phrase in sentence)
  return [part for phrase in phrases if (part := [word for word in phrase if word != '1'])]


def _count(thing, sentences):
  """How many there are by the sentence that has most; None if named, but never with a number."""
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
  """Whether two words are one, or its plural."""
  short, long = sorted((one, other), key=len)
  plurals = (short, f'{short}s', f'{short}es', f'{short[:-1]}ies' if short.endswith('y') else '')
  return long in plurals
