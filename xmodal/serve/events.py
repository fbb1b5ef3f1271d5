"""Answers that come in parts, as server-sent events (HTML standard, section 9.2)."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
import io
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import Response

from xmodal import strict_json
from xmodal.serve.limits import Call

_PREVIEWS = 10  # pictures shown of the way to one


def event(data: Any, name: str = '') -> bytes:
  """One event; `data` is JSON values, or a text."""
  text = data if isinstance(data, str) else strict_json.dumps(data, ensure_ascii=False)
  return (f'event: {name}\n' if name else '').encode() + f'data: {text}\n\n'.encode()


class Events(Response):
  """A response of events; ends its call whatever happens."""

  def __init__(self, events: AsyncIterator[bytes], call: Call, seconds: float):
    """`seconds`: after which a client that reads too slowly is given up."""
    super().__init__()
    self._events, self._call, self._seconds = events, call, seconds

  async def __call__(self, scope, receive, send) -> None:
    try:
      async with asyncio.timeout(self._seconds):
        await send({'type': 'http.response.start', 'status': 200, 'headers': [
            (b'content-type', b'text/event-stream; charset=utf-8'), (b'x-accel-buffering', b'no')]})
        async for part in self._events:
          await send({'type': 'http.response.body', 'body': part, 'more_body': True})
        await send({'type': 'http.response.body', 'body': b''})
    except TimeoutError:
      pass  # without its end the server closes the connection
    finally:
      await self._events.aclose()
      self._call.leave()


class Steps:
  """Steps of a prediction, from the model's thread to a response."""

  def __init__(self, show: Callable[[int, int, Any], Iterable[bytes]]):
    """`show` turns what engine.OnStep is called with into events."""
    self._loop, self._steps, self._show = asyncio.get_running_loop(), [], show
    self._is_new = asyncio.Event()

  def on_step(self, step: int, steps: int, shown: Any) -> None:
    """See engine.OnStep."""
    self._loop.call_soon_threadsafe(self._add, (step, steps, shown))

  def _add(self, step):
    self._steps.append(step)
    self._is_new.set()

  async def arrived(self) -> None:
    """Waits until `take` gives something."""
    await self._is_new.wait()

  def take(self) -> list[bytes]:
    """Events of the steps since the last call."""
    self._is_new.clear()
    taken, self._steps = self._steps, []
    return [part for step in taken for part in self._show(*step)]


def of_step(step: int, steps: int, shown: Sequence) -> Iterator[bytes]:
  """The event of a step of /v1/predict: its number, and the text or, now and then, the picture."""
  line = {'step': step, 'steps': steps}
  if isinstance(shown[0], str):
    line['text'] = shown[0]
  elif step == steps or step % max(1, steps // _PREVIEWS) == 0:
    line['png'] = _png(shown[0])
  yield event(line, 'step')


def _png(pixels):
  file = io.BytesIO()
  Image.fromarray(np.asarray(pixels)).save(file, 'PNG')
  return base64.b64encode(file.getvalue()).decode('ascii')
