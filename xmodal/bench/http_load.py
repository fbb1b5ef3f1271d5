"""A server in a process of its own, and clients that keep it busy; used by the benchmarks of it."""

import asyncio
from collections.abc import Callable, Sequence
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

from xmodal.errors import UserError

_START = 300  # seconds until a server is ready


class ServerProcess:
  """`xmodal serve` at a free port of this machine; a context that ends it."""

  def __init__(self, checkpoint: str, *arguments: str,
               program: Sequence[str] = ('-m', 'xmodal.serve')):
    """Starts it; UserError if it does not start.

    Args:
      checkpoint: a run or a bundle.
      *arguments: options of `xmodal serve`.
      program: what Python runs.
    """
    self.began = time.perf_counter()
    self._process = subprocess.Popen(
        [sys.executable, *program, '--checkpoint', checkpoint, '--port', '0', *arguments],
        stdout=subprocess.PIPE, text=True)
    found = re.match(r'http://127\.0\.0\.1:(\d+)/', self._process.stdout.readline())
    if found is None:
      raise UserError('the server did not start; its message is above')
    self.pid, self.port = self._process.pid, int(found[1])

  def wait_until_ready(self) -> float:
    """Returns the seconds from start to ready."""
    while True:
      try:
        urllib.request.urlopen(f'http://127.0.0.1:{self.port}/readyz', timeout=10).close()
        return time.perf_counter() - self.began
      except urllib.error.HTTPError as error:
        error.close()
      if self._process.poll() is not None or time.perf_counter() - self.began > _START:
        raise UserError(f'the server was not ready within {_START} seconds')
      time.sleep(0.05)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.stop()

  def stop(self) -> int:
    """Sends SIGTERM; returns the exit code."""
    self._process.terminate()
    return self._process.wait(60)

  def resident_bytes(self) -> int:
    """Memory of the process, as Linux counts it."""
    with open(f'/proc/{self.pid}/statm', encoding='ascii') as f:
      return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def http_request(body: bytes, path: str = '/v1/predict') -> bytes:
  """The bytes of a POST of JSON that keeps its connection."""
  return (f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
          f'Content-Length: {len(body)}\r\n\r\n').encode() + body


def predict_body(picture: str, text: str, task: str) -> bytes:
  """The JSON of one request; `picture` in base64."""
  return json.dumps({'task': task, 'text': text, 'image': picture}).encode()


class Client:
  """One connection; opened again after an error."""

  def __init__(self, port: int):
    self._port, self._streams = port, None

  async def send(self, request: bytes) -> tuple[int, bytes]:
    """Sends a request; returns the status and the body of the response."""
    if self._streams is None:
      self._streams = await asyncio.open_connection('127.0.0.1', self._port)
    reader, writer = self._streams
    try:
      writer.write(request)
      head = (await reader.readuntil(b'\r\n\r\n')).lower()
      length = re.search(rb'content-length: (\d+)', head)
      body = await reader.readexactly(int(length[1]))
      if b'connection: close' in head:
        self.close()
      return int(head.split(b' ', 2)[1]), body
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Closes the connection."""
    if self._streams is not None:
      self._streams[1].close()
      self._streams = None


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float,
         check: Callable[[int, int, bytes], None]) -> tuple[list[float], float]:
  """Keeps `clients` connections busy, each with one request at a time.

  Args:
    port: of the server on this machine.
    requests: sent in turn.
    clients: number of connections.
    seconds: how long.
    check: called with the number of the request, the status and the body of each response.

  Returns:
    The seconds of each request, and the responses per second.
  """
  return asyncio.run(_load(port, requests, clients, seconds, check))


async def _load(port, requests, clients, seconds, check):
  taken, end, number = [], time.perf_counter() + seconds, 0

  async def run():
    nonlocal number
    client = Client(port)
    while time.perf_counter() < end:
      place = number % len(requests)
      number += 1
      began = time.perf_counter()
      status, body = await client.send(requests[place])
      taken.append(time.perf_counter() - began)
      check(place, status, body)
    client.close()

  began = time.perf_counter()
  await asyncio.gather(*(run() for _ in range(clients)))
  return taken, len(taken) / (time.perf_counter() - began)
