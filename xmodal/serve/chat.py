"""OpenAI's chat completions: a chat as a request to a task, and an answer as a completion.

The model answers single questions, so only the last message of the user counts: its text, and its
picture, or else the last picture before it. Sources: the OpenAPI description of the OpenAI API,
POST /chat/completions, non-streamed and streamed.
"""

from collections.abc import Iterator
import time
from typing import Any
import uuid

from xmodal import strict_json
from xmodal.serve.forms import Asked, Chat, Reader, validated
from xmodal.serve.limits import Refused
from xmodal.serve.pictures import from_base64

_TEXTS = ('answer', 'caption', 'predicted')  # keys of Task.plain that are the answer by itself


def read(reader: Reader, value: dict[str, Any]) -> tuple[Asked, Chat]:
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


def first_chunk(model: str) -> dict[str, Any]:
  """What a stream begins with; later chunks repeat its id."""
  return _chunk(_head(model, 'chat.completion.chunk'), {'role': 'assistant', 'content': ''})


def last_chunks(first: dict[str, Any], answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """What ends a stream: the text in one piece, as the model's compiled loop gives it, and why it
  ends."""
  yield _chunk(first, {'content': content(answer)})
  yield _chunk(first, {}, 'stop')


def _head(model, kind):
  return {'id': f'chatcmpl-{uuid.uuid4().hex}', 'object': kind, 'created': int(time.time()),
          'model': model}


def _chunk(head, delta, finish=None):
  choice = {'index': 0, 'delta': delta, 'logprobs': None, 'finish_reason': finish}
  return head | {'choices': [choice]}
