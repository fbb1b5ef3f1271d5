"""Words of any script, for regular expressions: Python's \\w cuts them at their vowel signs.

Many scripts write vowels and accents as marks of their own (Hindi, Tamil, Thai, Arabic, decomposed
Latin), which are no letters to Python, though they belong to the word (UAX 29).
"""

import unicodedata


def _characters(kind: str) -> str:
  """All characters of a general category ('M', 'Cf'), as ranges within a [...]."""
  codes = [code for code in range(0x80, 0x20000)
           if unicodedata.category(chr(code)).startswith(kind)]
  starts = [code for code, before in zip(codes, [0, *codes]) if code != before + 1]
  stops = [code for code, after in zip(codes, [*codes[1:], 0]) if code != after - 1]
  return ''.join(f'{chr(start)}-{chr(stop)}' for start, stop in zip(starts, stops))


MARKS = _characters('M')
# Characters that show nothing: joiners, marks of direction, the soft hyphen.
FORMATS = _characters('Cf')
# Letters and digits, each with its marks; neither hyphen nor apostrophe.
WORD = rf'[^\W_](?:[^\W_]|[{MARKS}])*'
