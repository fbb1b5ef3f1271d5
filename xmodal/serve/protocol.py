"""HTTP/1.1 as uvicorn speaks it, with limits for connections and for the time of a request's
head, and an end to bodies that are refused."""

import http
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from xmodal.serve.limits import Limits, Refused


def limited(limits: Limits) -> type[H11Protocol]:
  """A protocol for uvicorn that closes connections that are too many, or whose request does not
  arrive in time."""
  seconds = limits.header_seconds

  class Limited(H11Protocol):
    """Begins its clock with a connection, and with the first byte of each later request."""

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      self._clock = None

    def connection_made(self, transport):
      super().connection_made(transport)
      self._clock = self.loop.call_later(seconds, self._late)
      if len(self.connections) > limits.connections:
        self._refuse(Refused(503, 'overloaded', f'{limits.connections} connections are open', 1))

    def data_received(self, data):
      super().data_received(data)
      if self.conn.their_state is not h11.IDLE:
        self._stop()
      elif self._clock is None:
        self._clock = self.loop.call_later(seconds, self._late)

    def on_response_complete(self):
      super().on_response_complete()
      if self.conn.their_state is h11.SEND_BODY:
        # Answered before the whole body: the rest, perhaps endless, would be read and thrown away.
        self.transport.close()

    def connection_lost(self, exc):
      self._stop()
      super().connection_lost(exc)

    def _stop(self):
      if self._clock is not None:
        self._clock.cancel()
        self._clock = None

    def _late(self):
      self._clock = None
      if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
        self._refuse(Refused(408, 'slow_head', 'the head of the request did not arrive within '
                             f'{seconds:g} seconds'))

    def send_400_response(self, msg):
      self._refuse(Refused(400, 'no_http', 'this is no HTTP/1.1 request, or its head is too large'))

    def _refuse(self, refused):
      # Written as bytes: after an error of the client h11 may have no state to answer from.
      body = json.dumps(refused.body)
      reason = http.HTTPStatus(refused.status).phrase
      self.transport.write(
          f'HTTP/1.1 {refused.status} {reason}\r\ncontent-type: application/json\r\n'
          f'content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}'.encode())
      self.transport.close()

  return Limited
