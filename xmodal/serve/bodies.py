"""Reads the body of a call into memory, never to a disk, and parses it."""

import asyncio
from collections.abc import AsyncIterator
import itertools
import json
import re
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from xmodal.serve.limits import Call, Limits, Refused

_MOST_PARTS = 256
_MOST_PART_HEADERS = 8
_BETWEEN = b' \t\n\r\v\f,:]}'  # what stands between values of JSON
# A string, the beginning of a list or object, or a number or literal. Takes linear time where
# nothing of _BETWEEN is at the end.
_VALUE = re.compile(rb'[%b]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[^"\[{%b]++)' % (
    (re.escape(_BETWEEN),) * 2), re.DOTALL)


async def read(stream: AsyncIterator[bytes], length: str | None, limits: Limits,
               call: Call) -> bytes:
  """The whole body.

  Args:
    stream: parts of the body.
    length: the Content-Length header, or None.
    limits: see body_bytes and body_seconds.
    call: holds the bytes.

  Raises:
    Refused: it is too large (413), too slow (408), or cut (499), or there is no memory left (503).
  """
  if length is not None and length.isdecimal() and int(length) > limits.body_bytes:
    raise _too_large(limits)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for part in stream:
        if len(body) + len(part) > limits.body_bytes:
          raise _too_large(limits)
        call.hold(len(part))
        body += part
  except TimeoutError:
    raise Refused(408, 'slow_body', 'the body did not arrive within '
                  f'{limits.body_seconds:g} seconds') from None
  except ClientDisconnect:
    raise Refused(499, 'left', 'the client has left') from None
  return bytes(body)


def _too_large(limits):
  return Refused(413, 'too_large', f'the body has more than {limits.body_bytes:,} bytes')


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
  """A JSON object; Refused (400) if it is none, nested too deep, or has too many values."""
  # Before parsing: each value takes about a hundred bytes, and two may do in the body.
  values = _VALUE.finditer(body.rstrip(_BETWEEN))
  if next(itertools.islice(values, limits.values, None), None):
    raise Refused(400, 'too_many_values', 'the JSON has more than '
                  f'{limits.values:,} names and values')
  deep = Refused(400, 'too_deep', f'the JSON is nested deeper than {limits.depth}')
  try:
    value = json.loads(body.decode('utf-8'), parse_constant=_no_number)
  except RecursionError:
    raise deep from None
  except UnicodeDecodeError:
    raise Refused(400, 'no_utf8', 'the body is not UTF-8; wanted JSON in UTF-8') from None
  except ValueError as error:
    raise Refused(400, 'no_json', f'the body is no JSON ({error})') from None
  if not isinstance(value, dict):
    raise Refused(400, 'no_object', f'the body is a {type(value).__name__}; wanted a JSON object')
  level = [value]
  for _ in range(limits.depth):
    level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)
             if isinstance(item, dict | list)]
    if not level:
      return value
  raise deep


def _no_number(name):
  raise ValueError(f'{name} is no number of JSON')


def parse_form(body: bytes, content_type: str) -> list[tuple[str, bool, bytes]]:
  """The parts of multipart/form-data: (name, whether it is a file, content) each.

  Raises:
    Refused: it is damaged, or has too many parts (400).
  """
  _, options = parse_options_header(content_type)
  parts: list[tuple[str, bool, bytes]] = []
  headers: list[tuple[bytes, bytes]] = []
  field, value, content = bytearray(), bytearray(), bytearray()
  ended = []

  def add(into):
    def on_data(data, start, end):
      into.extend(data[start:end])
    return on_data

  def on_part_begin():
    headers.clear()
    content.clear()
    if len(parts) >= _MOST_PARTS:
      raise Refused(400, 'no_form', f'the form has more than {_MOST_PARTS} parts')

  def on_header_end():
    if len(headers) >= _MOST_PART_HEADERS:
      raise Refused(400, 'no_form', 'a part of the form has too many headers')
    headers.append((bytes(field).lower(), bytes(value)))
    field.clear()
    value.clear()

  def on_part_end():
    _, found = parse_options_header(dict(headers).get(b'content-disposition', b''))
    name = found.get(b'name', b'').decode('utf-8', 'replace')
    parts.append((name, b'filename' in found, bytes(content)))

  try:
    parser = MultipartParser(options.get(b'boundary', b''), {
        'on_part_begin': on_part_begin, 'on_header_field': add(field),
        'on_header_value': add(value), 'on_header_end': on_header_end, 'on_part_data': add(content),
        'on_part_end': on_part_end, 'on_end': lambda: ended.append(True)})
    parser.write(body)
    parser.finalize()
  except (MultipartParseError, ValueError) as error:
    raise Refused(400, 'no_form', f'the form is damaged ({error})') from None
  if not ended:
    raise Refused(400, 'no_form', 'the form is cut: its last boundary is missing')
  return parts
