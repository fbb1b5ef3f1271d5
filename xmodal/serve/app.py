"""The routes of the server."""

import asyncio
from collections.abc import Callable
import concurrent.futures
import contextlib
import importlib.resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

import xmodal
from xmodal import strict_json
from xmodal.data.pipeline import cores
from xmodal.errors import UserError
from xmodal.serve import bodies, chat, openapi
from xmodal.serve.batcher import Batcher, Failed
from xmodal.serve.engine import Engine
from xmodal.serve.events import Events, Steps, event, of_step
from xmodal.serve.forms import RequestReader
from xmodal.serve.guard import Guard, failed, response
from xmodal.serve.limits import Admission, Limits, Refused, Room
from xmodal.serve.metrics import Metrics

_PAGE = {'/': ('index.html', 'text/html'), '/page.js': ('page.js', 'text/javascript'),
         '/page.css': ('page.css', 'text/css')}

_MOST_DECODING = 4  # threads


class Server:
  """The application and what it holds.

  Attributes:
    app: the ASGI application. Its lifespan starts and ends the batcher.
    batcher, admission, metrics: see there.
  """

  def __init__(self, engine: Engine, limits: Limits, *, key: str | None = None,
               only_local: bool = False,
               wait_seconds: float = 0.005, batching: bool = True):
    """A server of a loaded model.

    Args:
      engine: the model.
      limits: see there.
      key: what clients have to give; None: nothing.
      only_local: whether it listens at this machine's own address.
      wait_seconds, batching: see Batcher.
    """
    self._engine, self._limits = engine, limits
    self.admission = Admission(limits, lambda: self.batcher.wake())
    self.batcher = Batcher(engine, wait_seconds=wait_seconds, batching=batching,
                           coming=lambda: self.admission.coming > 0,
                           on_batch=lambda task, rows: self.metrics.rows.labels(task).observe(rows))
    self.metrics = Metrics(lambda: len(self.batcher), lambda: self.admission.calls)
    # Threads that decode pictures: a few keep the model's thread busy, and each takes memory.
    self._pool = concurrent.futures.ThreadPoolExecutor(min(cores(), _MOST_DECODING), 'decode')
    self._room = Room(limits.held_bytes)
    app = FastAPI(title='xmodal', version=xmodal.__version__, docs_url=None, redoc_url=None,
                  lifespan=self._lifespan)
    self._add_routes(app)
    app.openapi = lambda: openapi.described(app, has_key=key is not None)
    app.exception_handler(HTTPException)(_of_http)
    app.exception_handler(Refused)(self._refuse)
    app.exception_handler(Exception)(_fail)
    self.app = Guard(app, limits, self.metrics, key, only_local)

  @contextlib.asynccontextmanager
  async def _lifespan(self, app):
    self.batcher.start()
    yield
    await asyncio.to_thread(self.batcher.close)
    self._pool.shutdown(wait=False, cancel_futures=True)

  async def _refuse(self, request, refused):
    self.metrics.errors.labels(refused.code).inc()
    return response(refused)

  def _add_routes(self, app: FastAPI) -> None:
    status = openapi.answers('Status')
    app.get('/healthz', summary='Whether the process runs and could compile.', responses=status
            )(self._healthz)
    app.get('/readyz', summary='Whether the model is compiled and answers.', responses=status
            )(self._readyz)
    app.get('/metrics', summary='Metrics for Prometheus.', response_class=PlainTextResponse
            )(self._metrics)
    app.get('/v1/models', summary="The model's tasks, in OpenAI's form.",
            responses=openapi.answers('Models'))(self._models)
    app.post('/v1/predict', summary='Answers one request or several.',
             openapi_extra=openapi.body('Predict', 'multipart/form-data'),
             responses=openapi.answers('Answer', 'Answers', streams=True))(self._predict)
    app.post('/v1/chat/completions', summary="A question as a chat, in OpenAI's form.",
             openapi_extra=openapi.body('Chat'),
             responses=openapi.answers('Completion', streams=True))(self._chat)
    for path, (name, kind) in _PAGE.items():
      app.get(path, include_in_schema=False)(_file(name, kind))

  async def _healthz(self):
    self._check_compiled()
    return {'status': 'alive'}

  async def _readyz(self):
    self._check_ready()
    return {'status': 'ready'}

  def _check_compiled(self):
    if self.batcher.problem:  # for good: only a new process may do better
      raise Refused(503, 'cannot_compile', self.batcher.problem)

  def _check_ready(self):
    self._check_compiled()
    if not self.batcher.ready.is_set():
      raise Refused(503, 'not_ready', 'the model is being compiled', 5)

  async def _metrics(self):
    return Response(self.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  async def _models(self):
    limits = self._limits
    return {'object': 'list', 'name': self._engine.name, 'data': [
        {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'xmodal', 'draws': facts.draws,
         'writes': facts.writes, 'ranks': facts.ranks, 'reads_text': facts.reads_text,
         'options': facts.options}
        for name, facts in self._engine.tasks.items()], 'limits': {
            'body_bytes': limits.body_bytes, 'pixels': limits.pixels, 'text': limits.text,
            'requests': limits.requests, 'pictures': limits.pictures, 'drawn': limits.drawn,
            'steps': limits.steps}}

  # ---- calls to the model

  async def _predict(self, request: HttpRequest):
    kind = request.headers.get('content-type', '')

    def read(reader, body):
      return reader.predict(body, kind)

    async with self._call(request, read) as (call, requests, form):
      if form.stream:
        name, wanted = requests[0]
        return self._events(request, call, name, wanted, of_step, lambda found: [
            event({'task': name, **found}, 'answer')])
      found = await self._answers(request, call, requests)
      lines = [{'task': name, **line} for (name, _), line in zip(requests, found)]
      return _json({'answers': lines} if form.requests is not None else lines[0])

  async def _chat(self, request: HttpRequest):
    def read(reader, body):
      return chat.read(reader, bodies.parse_json(body, self._limits))

    async with self._call(request, read) as (call, named, form):
      name, wanted = named
      if not form.stream:
        found, = await self._answers(request, call, [named])
        return _json(chat.completion(name, found))
      chunks = chat.Chunks(name)
      show = chunks.of_step if self._engine.tasks[name].writes else None
      return self._events(request, call, name, wanted, show, chunks.last, chunks.first())

  @contextlib.asynccontextmanager
  async def _call(self, request: HttpRequest, read: Callable):
    """Reads a call: gives the Call and what `read` (reader, body) returns; ends the call, unless a
    stream has taken it over."""
    self._check_ready()
    call, reading = self.admission.enter(), None
    request.state.call = call
    try:
      body = await bodies.read(request.stream(), request.headers.get('content-length'),
                               self._limits, call)
      request.state.end = asyncio.get_running_loop().time() + self._limits.answer_seconds
      reader = RequestReader(self._engine, self._limits, call.hold, self._room)
      reading = self._pool.submit(read, reader, body)
      found, form = await self._in_time(request, asyncio.wrap_future(reading))
      request.scope['state']['task'] = (found if isinstance(found, tuple) else found[0])[0]
      yield call, found, form
    finally:
      if request.state.call is call:
        if reading is None:
          call.leave()
        else:  # a thread that still decodes keeps its memory, and ends with this picture
          call.give_up()
          reading.cancel()
          reading.add_done_callback(lambda _: call.leave())

  async def _in_time(self, request, work):
    """The result of a future; Refused if it is late or the client leaves, which cancels it."""
    gone = asyncio.ensure_future(_gone(request))
    try:
      await asyncio.wait({work, gone}, timeout=_left(request), return_when=asyncio.FIRST_COMPLETED)
      return _found(work, gone, self._limits)
    finally:
      gone.cancel()
      work.cancel()

  async def _answers(self, request, call, requests) -> list[dict[str, Any]]:
    """The answers to requests; Refused if one is wrong, or none comes in time."""
    futures = [self.batcher.submit(name, wanted) for name, wanted in requests]
    call.arrived()
    work = asyncio.gather(*map(asyncio.wrap_future, futures))
    work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask
    try:
      return await self._in_time(request, work)
    finally:
      for future in futures:  # those that have not begun are dropped
        future.cancel()

  def _events(self, request, call, name, wanted, show, last, begin=b''):
    """Submits a request; gives a stream of the steps, if the task has some, and the answer."""
    facts = self._engine.tasks[name]
    steps = Steps(show) if show is not None and (facts.draws or facts.writes) else None
    future = self.batcher.submit(name, wanted, steps.on_step if steps else None)
    request.state.call = None  # the stream ends it
    call.arrived()
    return Events(self._stream(request, future, last, steps, begin), call,
                  self._limits.answer_seconds + self._limits.read_seconds)

  async def _stream(self, request, future, last, steps, begin):
    work, gone = asyncio.wrap_future(future), asyncio.ensure_future(_gone(request))
    try:
      if begin:
        yield begin
      while not (work.done() or gone.done()) and (left := _left(request)) > 0:
        step = asyncio.ensure_future(steps.arrived()) if steps else None
        await asyncio.wait({work, gone, step} - {None}, timeout=left,
                           return_when=asyncio.FIRST_COMPLETED)
        if steps:
          step.cancel()
          for part in steps.take():
            yield part
      for part in steps.take() if steps else ():  # those that came while others were sent
        yield part
      try:
        found = _found(work, gone, self._limits)
      except Refused as refused:
        self.metrics.errors.labels(refused.code).inc()
        yield event(refused.body, 'error')
      else:
        for part in last(found):
          yield part
    finally:
      work.cancel()
      gone.cancel()
      future.cancel()


def _left(request):
  """Seconds until a call's answer is late, at least 0."""
  return max(0.0, request.state.end - asyncio.get_running_loop().time())


async def _gone(request) -> None:
  """Returns when the client has left."""
  while (await request.receive())['type'] != 'http.disconnect':
    pass


def _found(work, gone, limits):
  """The result of `work` if it is done; else Refused says why not."""
  if not work.done():
    if gone.done():
      raise Refused(499, 'left', 'the client has left')
    raise Refused(504, 'late', f'there was no answer within {limits.answer_seconds:g} seconds')
  try:
    return work.result()
  except UserError as error:
    raise Refused(422, 'invalid', str(error)) from None
  except Failed:
    raise Refused(500, 'failed', 'the model failed; the log of the server says why') from None


def _json(value) -> Response:
  return Response(strict_json.dumps(value, ensure_ascii=False).encode(),
                  media_type='application/json')


async def _fail(request, error):
  return failed()


async def _of_http(request, error):
  """FastAPI's own refusals (no such route, no such method) in the form of the others."""
  refused = Refused(error.status_code, 'no_route', f'{request.method} {request.url.path[:80]}: '
                    f'{error.detail}')
  return response(refused)


def _file(name, kind):
  content = importlib.resources.files('xmodal.serve').joinpath('page', name).read_bytes()

  async def file():
    return Response(content, media_type=kind)
  return file
