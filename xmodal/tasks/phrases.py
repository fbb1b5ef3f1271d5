"""Splits --text into several texts, with one rule for all tasks."""

from collections.abc import Iterable
import re

# Full stops of Chinese and Japanese, Hindi, Urdu and Amharic, and their semicolons.
_STOPS = '\u3002\uff0e\uff61\u0964\u06d4\u1362\uff1b\u061b'
_END = rf'(?:\.+(?=\s|$)|[;\n{_STOPS}])'
# Abbreviations after which a text continues; 'etc.' and 'Inc.' often end one.
_ABBREVIATED = r"""(?:
    \b(?i:mr|mrs|ms|dr|prof|st|mt|gen|lt|col|vs)\.(?=\s+\S)
  | \b(?i:no)\.(?=\s+\d)
  | \b(?:[^\W\d_]\.){2,}(?=\s|$)     # U.S.
  | \b[A-Z]\.(?=\s+[A-Z])            # George W. Bush
)"""


def split_texts(text: str, known: Iterable[str] = ()) -> tuple[str, ...]:
  """Splits a text into distinct texts, in their order, without the characters that end them.

  A text ends with a full stop before a space or at the end, a full stop of another script, a
  semicolon, or the end of a line. A full stop within a word ('usb 3.0 cable') or of an
  abbreviation ('U.S. flag', 'Mt. Fuji') ends none.

  Args:
    text: the user's text.
    known: names that are never split.
  """
  parts = (m['text'].strip() for m in re.finditer(
      pattern(known), re.sub(r'[^\S\n]+', ' ', text), re.X))
  return tuple(dict.fromkeys(part for part in parts if part.strip('.')))


def pattern(known: Iterable[str] = ()) -> str:
  """The verbose regular expression of one of the texts, its group `text`; see split_texts."""
  # The longest first, so that 'No. 5 sign' does not match 'No. 5'.
  names = '|'.join(re.escape(name) for name in sorted(known, key=len, reverse=True) if name)
  taken = rf'(?:{names})(?=\s*(?:{_END}|$)|(?<=\.)\s)|' if names else ''
  return rf'\s*(?P<text>{taken}(?:{_ABBREVIATED}|(?!{_END})[\s\S])+){_END}?'
