"""Checks before every route: size of the head, key, foreign pages; errors and metrics of all."""

import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xmodal.serve.limits import Limits, Refused
from xmodal.serve.metrics import Metrics

_LOG = logging.getLogger('xmodal.serve')
_LOCAL = ('localhost', '127.0.0.1', '::1')
NEEDS_KEY = ('/v1/', '/metrics', '/openapi.json')
# The page loads nothing from elsewhere, and sends nothing there.
_HEADERS = {
    'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
                               "'self' data: blob:; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer',
    'cache-control': 'no-store'}


class Guard:
  """An ASGI application around another."""

  def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, key: str | None,
               only_local: bool = False):
    self._app, self._limits, self._metrics = app, limits, metrics
    # A page whose host's name is made to mean this machine (DNS rebinding) is of its own origin.
    self._hosts = _LOCAL if only_local and not key else None
    self._key = key.encode() if key else None

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    began, status = time.perf_counter(), 0

    async def sent(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        message['headers'] = [*message['headers'], *(
            (name.encode(), value.encode()) for name, value in _HEADERS.items())]
      await send(message)

    try:
      self._check(scope)
      await self._app(scope, receive, sent)
    except Refused as refused:
      self._metrics.errors.labels(refused.code).inc()
      await response(refused)(scope, receive, sent)
    except Exception:
      _LOG.exception('%s %s failed', scope['method'], scope['path'])
      if not status:  # else the client has got a response, or a part of one
        await failed()(scope, receive, sent)
    finally:
      route = getattr(scope.get('route'), 'path', 'other')
      task = scope.get('state', {}).get('task', '')
      self._metrics.requests.labels(route, task, str(status)).inc()
      self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

  def _check(self, scope):
    headers = scope['headers']
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    size += len(scope['raw_path'] or b'') + len(scope['query_string'])
    if size > self._limits.header_bytes:
      raise Refused(431, 'large_head', 'the head of the request has more than '
                    f'{self._limits.header_bytes:,} bytes')
    found = dict(headers)
    host = found.get(b'host', b'').decode('latin-1')
    if self._hosts is not None and _name(host) not in self._hosts:
      raise Refused(403, 'foreign_host', 'without a key, this server answers as localhost alone')
    origin = found.get(b'origin', b'').decode('latin-1')
    if scope['method'] == 'POST' and origin and (_split(origin).netloc or None) != host:
      raise Refused(403, 'foreign_page', 'a page of another host may not use this server')
    if self._key is not None and scope['path'].startswith(NEEDS_KEY):
      given = found.get(b'authorization', b'')
      if not hmac.compare_digest(given, b'Bearer ' + self._key):
        raise Refused(401, 'invalid_api_key', 'wanted the header Authorization: Bearer KEY')


def _split(address):
  """The parts of an address; of none if it is damaged."""
  try:
    return urlsplit(address)
  except ValueError:
    return urlsplit('')


def _name(host):
  """The name in a header Host, without its port; '' if it is none."""
  return _split(f'//{host}').hostname or ''


def response(refused: Refused) -> JSONResponse:
  """The response to a request that is refused."""
  headers = {}
  if refused.status == 401:
    headers['www-authenticate'] = 'Bearer'
  if refused.retry_after is not None:
    headers['retry-after'] = str(refused.retry_after)
  return JSONResponse(refused.body, refused.status, headers)


def failed() -> JSONResponse:
  """The response to a request at which the server fails; tells nothing of its insides."""
  return response(Refused(500, 'failed', 'the server failed; its log says why'))
