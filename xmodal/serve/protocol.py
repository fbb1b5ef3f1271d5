"""HTTP/1.1 as uvicorn speaks it, with limits for connections, for the time of a request's head and
for clients that do not read, and an end to bodies that are refused."""

import http
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from xmodal.serve.limits import Limits, Refused

_LEAST_READ = 256 * 2**10  # bytes of a response within limits.read_seconds


def limited(limits: Limits) -> type[H11Protocol]:
  """A protocol for uvicorn that closes connections that are too many, whose request does not
  arrive in time, or whose client does not read."""
  seconds = limits.header_seconds

  class Limited(H11Protocol):
    """Begins its clock with a connection, and with the first byte of each later request."""

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      self._clock = self._reading = None

    def connection_made(self, transport):
      super().connection_made(transport)
      transport.set_write_buffer_limits(0)  # writing pauses while anything is left in the buffer
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
      self._stop_reading()
      super().connection_lost(exc)

    def pause_writing(self):
      super().pause_writing()
      self._wait_until_read()

    def resume_writing(self):
      self._stop_reading()
      super().resume_writing()

    def _wait_until_read(self):
      self._reading = self.loop.call_later(
          limits.read_seconds, self._check_read, self.transport.get_write_buffer_size())

    def _check_read(self, before):
      if before - self.transport.get_write_buffer_size() < _LEAST_READ:
        self.transport.abort()  # `close` would wait for the client, too
      else:
        self._wait_until_read()

    def _stop_reading(self):
      if self._reading is not None:
        self._reading.cancel()
        self._reading = None

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
