"""Parses the records of a JSON list one at a time: a local file of gigabytes in constant memory."""

from collections.abc import Iterator
import json
import re
from typing import Any

from xmodal import storage

_CHUNK = 1 << 20  # characters that are read at a time, at least
_SPACE = re.compile(r'[ \t\n\r]*')  # white space of JSON
_COMMA = re.compile(r'[ \t\n\r]*,[ \t\n\r]*')


class Irregular(Exception):
  """The file is broken JSON, or not of the form that is read here."""


def records(path: str, key: str = '') -> Iterator[Any]:
  """Yields the items of a JSON file's list, or of the list under a key of its object, parsed.

  The whole file is read, so that what follows the list is checked, too.

  Args:
    path: the file, in UTF-8.
    key: of the list; '': the file is a list.

  Raises:
    Irregular: anything else, also files that json.load accepts (a key given twice). json.load tells
      what is wrong.
  """
  try:
    with storage.open_file(path, encoding='utf-8-sig') as file:
      yield from _Parser(file).file(key)
  except (OSError, ValueError, RecursionError) as error:
    raise Irregular(str(error)) from error


class _Parser:
  """Parses text that is read as it is needed."""

  def __init__(self, file):
    self._file, self._text, self._place, self._ended = file, '', 0, False
    decoder = json.JSONDecoder()
    self._decode, self._scan = decoder.raw_decode, decoder.scan_once

  def file(self, key):
    if not key:
      self._take('[')
      yield from self._list()
    else:
      self._take('{')
      yield from self._members(key)
    if self._next():
      raise Irregular('more after the end')

  def _members(self, key):
    """Yields the items of the list under a key of an object after its bracket."""
    met = set()
    while not met or self._next() == ',':
      if met:
        self._take(',')
      name = self._value()
      if not isinstance(name, str) or name in met:
        raise Irregular(f'{name!r}, wanted a new key')
      met.add(name)
      self._take(':')
      if name == key:
        self._take('[')
        yield from self._list()
      else:
        self._value()
    self._take('}')
    if key not in met:
      raise Irregular(f'no {key!r}')

  def _list(self):
    """Yields the items of a list after its bracket, and takes the closing one."""
    if self._next() == ']':
      self._place += 1
      return
    scan, comma = self._scan, _COMMA.match
    while True:
      # Nearly always an item and the comma after it are in the text that has been read.
      try:
        value, end = scan(self._text, self._place)
        after = comma(self._text, end)
      except (StopIteration, json.JSONDecodeError):
        after = None
      if after is not None:
        self._place = after.end()
        yield value
        continue
      yield self._value()
      mark = self._next()
      self._place += 1
      if mark == ']':
        return
      if mark != ',':
        raise Irregular(f'{mark!r} in a list')
      self._next()  # to the item: the scanner takes no space before it

  def _next(self):
    """The next character that is no white space, which is not taken; '' at the end."""
    while True:
      self._place = _SPACE.match(self._text, self._place).end()
      if self._place < len(self._text):
        return self._text[self._place]
      if not self._read(_CHUNK):
        return ''

  def _take(self, mark):
    if self._next() != mark:
      raise Irregular(f'no {mark!r}')
    self._place += 1

  def _value(self):
    size = _CHUNK
    while True:
      self._next()
      try:
        value, end = self._decode(self._text, self._place)
        # A number at the end of the text may go on: after "1" also ".5" and "e3".
        if self._text[end:end + 1] not in ('', '.', 'e', 'E') or self._ended:
          self._place = end
          return value
      except json.JSONDecodeError:
        if self._ended:
          raise
      self._read(size)
      size *= 2  # a value of many chunks is parsed few times

  def _read(self, size):
    """Reads on, and forgets what is parsed; returns whether there was more."""
    more = self._file.read(size)
    self._text, self._place = self._text[self._place:] + more, 0
    self._ended = not more
    return bool(more)
