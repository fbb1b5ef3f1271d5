"""Answers that come in parts, as server-sent events (HTML standard, section 9.2)."""

import asyncio
import base64
from collections.abc import AsyncIterator
import io
from typing import Any

import numpy as np
from PIL import Image

from xmodal import strict_json
from xmodal.serve.limits import Call

_PREVIEWS = 10  # pictures shown of the way to one


def event(data: Any, name: str = '') -> bytes:
  """One event; `data` is JSON values, or a text."""
  text = data if isinstance(data, str) else strict_json.dumps(data, ensure_ascii=False)
  return (f'event: {name}\n' if name else '').encode() + f'data: {text}\n\n'.encode()


class Events:
  """A response of events; ends its call whatever happens."""

  def __init__(self, events: AsyncIterator[bytes], call: Call):
    self._events, self._call = events, call

  async def __call__(self, scope, receive, send) -> None:
    try:
      await send({'type': 'http.response.start', 'status': 200, 'headers': [
          (b'content-type', b'text/event-stream; charset=utf-8'), (b'x-accel-buffering', b'no')]})
      async for part in self._events:
        await send({'type': 'http.response.body', 'body': part, 'more_body': True})
      await send({'type': 'http.response.body', 'body': b''})
    finally:
      await self._events.aclose()
      self._call.leave()


class Steps:
  """Steps of drawing, from the model's thread to a response.

  `on_step` takes them, `next` gives them as events: the number of each step, and with some of them
  the picture so far.
  """

  def __init__(self):
    self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

  def on_step(self, step: int, steps: int, pictures: np.ndarray) -> None:
    """See engine.OnStep."""
    self._loop.call_soon_threadsafe(self._queue.put_nowait, (step, steps, pictures))

  async def next(self) -> bytes:
    """Waits for the next event."""
    step, steps, pictures = await self._queue.get()
    line = {'step': step, 'steps': steps}
    if step == steps or step % max(1, steps // _PREVIEWS) == 0:
      line['png'] = _png(pictures[0])
    return event(line, 'step')

  def __len__(self) -> int:
    return self._queue.qsize()


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(np.asarray(pixels)).save(file, 'PNG')
  return base64.b64encode(file.getvalue()).decode('ascii')
