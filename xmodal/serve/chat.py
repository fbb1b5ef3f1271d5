"""OpenAI's chat completions: a chat as a request to a task, and an answer as a completion.

The model answers single questions, so only the last message of the user counts: its text, and its
picture, or else the last picture before it. Sources: the OpenAPI description of the OpenAI API,
POST /chat/completions, non-streamed and streamed.
"""

from collections.abc import Iterator, Sequence
import os
import time
from typing import Any
import uuid

from xmodal import strict_json
from xmodal.serve.events import event
from xmodal.serve.forms import Chat, NamedRequest, RequestReader, validated
from xmodal.serve.limits import Refused
from xmodal.serve.pictures import from_base64

_TEXTS = ('answer', 'caption', 'predicted')  # keys of Task.plain that are the answer by itself


def read(reader: RequestReader, value: dict[str, Any]) -> tuple[NamedRequest, Chat]:
  """A chat as a request to the task that `model` names.

  Raises:
    Refused: it is no such chat.
  """
  form = validated(Chat, value)
  name, facts = reader.task(form.model)
  if form.n not in (None, 1):
    raise Refused(422, 'invalid', f'n is {form.n}; wanted 1: an answer is not sampled')
  if form.messages[-1].role != 'user':
    raise Refused(422, 'invalid', f'the last message is of {form.messages[-1].role[:40]!r}; wanted '
                  'user')
  text, _ = _parts(form.messages[-1])
  addresses = next((found for message in reversed(form.messages) if (found := _parts(message)[1])),
                   [])
  if len(addresses) > (most := reader.opening.limits.pictures):
    raise Refused(422, 'too_many_pictures', f'{len(addresses)} pictures; wanted up to {most}')
  pictures = [from_base64(address, 'image_url', reader.opening) for address in addresses]
  return (name, reader.request(facts, pictures, text, {}, False)), form


def _parts(message):
  """The text of a message, and the addresses of its pictures."""
  if message.content is None or isinstance(message.content, str):
    return message.content or '', []
  texts, addresses = [], []
  for part in message.content:
    kind = part.get('type')
    if kind == 'text' and isinstance(part.get('text'), str):
      texts.append(part['text'])
    elif kind == 'image_url':
      url = part.get('image_url')
      url = url.get('url') if isinstance(url, dict) else url
      if not isinstance(url, str) or not url.lower().startswith('data:'):
        raise Refused(422, 'no_addresses', 'image_url is no data: URL; no file or address is '
                      'opened: send the picture as data:image/png;base64,...')
      addresses.append(url)
    else:
      raise Refused(422, 'invalid', f'a part of a message is of type {str(kind)[:40]!r}; wanted '
                    'text or image_url')
  return '\n'.join(texts), addresses


def content(answer: dict[str, Any]) -> str:
  """An answer as the text of a message: the answer itself, or JSON if it has parts."""
  for key in _TEXTS:
    if key in answer:
      return str(answer[key])
  return strict_json.dumps(answer, ensure_ascii=False)


def completion(model: str, answer: dict[str, Any]) -> dict[str, Any]:
  """The whole response."""
  message = {'role': 'assistant', 'content': content(answer)}
  return _head(model, 'chat.completion') | {'choices': [
      {'index': 0, 'message': message, 'logprobs': None, 'finish_reason': 'stop'}]}


class Chunks:
  """The chunks of a streamed completion."""

  def __init__(self, model: str):
    self._head = _head(model, 'chat.completion.chunk')
    self._text = self._sent = ''

  def first(self) -> bytes:
    """What a stream begins with."""
    return event(_chunk(self._head, {'role': 'assistant', 'content': ''}))

  def of_step(self, step: int, steps: int, texts: Sequence[str]) -> Iterator[bytes]:
    """What a token adds. The next token may change how the last one is written, so that a text is
    sent as far as two steps agree."""
    del step, steps
    agreed = os.path.commonprefix([self._text, texts[0]])
    self._text = texts[0]
    if len(agreed) > len(self._sent) and agreed.startswith(self._sent):
      yield event(_chunk(self._head, {'content': agreed[len(self._sent):]}))
      self._sent = agreed

  def last(self, answer: dict[str, Any]) -> Iterator[bytes]:
    """The rest of the text, and what ends a stream."""
    whole = content(answer)
    yield event(_chunk(self._head, {'content': whole[len(self._sent):]}))
    yield event(_chunk(self._head, {}, 'stop'))
    yield event('[DONE]')


def _head(model, kind):
  return {'id': f'chatcmpl-{uuid.uuid4().hex}', 'object': kind, 'created': int(time.time()),
          'model': model}


def _chunk(head, delta, finish=None):
  choice = {'index': 0, 'delta': delta, 'logprobs': None, 'finish_reason': finish}
  return head | {'choices': [choice]}
