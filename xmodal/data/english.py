"""Decides whether a text is English, for rules that only know English words."""

import functools
import re
import unicodedata

from xmodal.data.example import Example

_WORDS = re.compile(r'[^\W\d_]+')
# Words that, among common languages in Latin script, only English has.
_ENGLISH = frozenset(
    """the and with what which who whose where there this that these those it its does did how many
    any some you your they their from have between behind above below front next near each other
    only all not yes because can could would should do be been being or but than then when while
    one two three four five seven eight ten color colour shape picture image object objects thing
    things circle square triangle cross red blue green yellow black white brown gray grey purple
    are were both used left right more most man men woman women person people child boy girl dog cat
    horse bird car street road water table sitting standing holding riding looking walking showing
    seen shown visible present lung heart chest brain patient obvious lady guy kid shirt jacket
    pants hair head tree trees grass building house kitchen bathroom bedroom chair couch bench desk
    window floor plate bowl bottle knife spoon sandwich cake food truck bike bicycle motorcycle
    airplane boat beach ocean sky snow mountain field group close little old young wearing carrying
    eating playing driving flying laying lying sleeping parked wooden striped big tall short dark
    light bright sign player players wave surfboard skateboard""".split())
# Common English words that other languages have too.
_SHARED = frozenset('a an i is was of in on at to for by as no he his her has we so me my'
                    ' up out if'.split())
_SHORT = 3  # up to this many words, a text is a name and not a sentence
# Left and right, east and west in other languages in Latin script: words and word beginnings.
_SIDES = frozenset('destra destro destri destre sinistra sinistro dreta drets bal balra jobb '
                   'jobbra sol solda solunda sagda leva levo levi levy prava pravo pravi pravy '
                   'lewo prawo ovest oeste este ouest ost osten westen linke linker linkes linken'
                   .split())
_SIDE_STEMS = ('links', 'recht', 'regs', 'izquierd', 'derech', 'gauch', 'droit', 'sinistr',
               'esquerd', 'esquerr', 'direit', 'dereit', 'venstr', 'hoyre', 'hojre', 'hogra',
               'hoger', 'vanster', 'lewa', 'lewe', 'lewy', 'prawa', 'prawe', 'prawy', 'vlevo',
               'vpravo', 'lijev', 'desn', 'stang', 'dreapt', 'vasem', 'vasen', 'oike', 'kiri',
               'kanan', 'kushot', 'kulia', 'kaliwa', 'baloldal', 'jobbold')


def has_no_foreign_side(name: str) -> bool:
  """Whether a name's letters are ASCII, and no word is a known foreign one for left or right."""
  words = _WORDS.findall(name.lower())
  return all(word.isascii() and word not in _SIDES and not word.startswith(_SIDE_STEMS)
             for word in words)


@functools.lru_cache(maxsize=1 << 16)
def is_english(text: str) -> bool:
  """Whether a text is English: it has a word that only English has, or half its words are known.

  A text of up to three words counts as English if has_no_foreign_side. A text without letters
  counts as English.
  """
  words = _WORDS.findall(text.lower())
  if len(words) <= _SHORT:
    return has_no_foreign_side(text)
  if not all(word.isascii() or _is_latin(word) for word in words):
    return False
  known = sum(word in _ENGLISH or word in _SHARED for word in words)
  return 2 * known >= len(words) or not _ENGLISH.isdisjoint(words)


def foreign_text(example: Example) -> str | None:
  """The first text of an example that is not English; None if it reads as English.

  Answers, often too short, count only if there is no other text.
  """
  texts = (example.question, *example.captions, example.reason,
           example.expression.name if example.expression else '')
  texts = [text for text in texts if text] or example.answers
  return next((text for text in texts if not is_english(text)), None)


def _is_latin(word):
  return all(unicodedata.name(letter, '').startswith('LATIN') for letter in word)
