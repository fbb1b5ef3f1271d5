"""Regular expressions for words of any script: Python's \\w splits words at their vowel signs.

Many scripts write vowels and accents as separate marks (Hindi, Tamil, Thai, Arabic, decomposed
Latin), which Python does not count as letters, although they belong to the word (UAX 29).
"""

import unicodedata


def _characters(kind: str) -> str:
  """All non-ASCII characters of a general category ('M', 'Cf'), as ranges for a [...]."""
  codes = [code for code in range(0x80, 0x20000)
           if unicodedata.category(chr(code)).startswith(kind)]
  starts = [code for code, before in zip(codes, [0, *codes]) if code != before + 1]
  stops = [code for code, after in zip(codes, [*codes[1:], 0]) if code != after - 1]
  return ''.join(f'{chr(start)}-{chr(stop)}' for start, stop in zip(starts, stops))


MARKS = _characters('M')
# Invisible characters: joiners, marks of direction, the soft hyphen.
FORMATS = _characters('Cf')
# Letters and digits, each with its marks; no hyphens or apostrophes.
WORD = rf'[^\W_](?:[^\W_]|[{MARKS}])*'
