"""Whether `xmodal serve` holds out under full load of valid and hostile requests.

`xmodal bench soak [--checkpoint DIR] [--minutes 60] [--clients 16]` mixes questions with
requests that the server has to refuse, and with clients that leave. It fails (exit code 1) if a
valid request is not answered, or not as `xmodal predict --input` answers it to the byte, if a
hostile one gets another status than it should, or if the server's memory after the first fifth of
the time differs by more than 5%. Linux only.
"""

import argparse
import asyncio
import base64
import collections
import json
import os
import random
import sys
import tempfile
import time

from xmodal import strict_json
from xmodal.bench.harness import check_positive, run_command
from xmodal.bench.http_load import Client, ServerProcess, http_request, predict_body
from xmodal.bench.predict import QUESTIONS, make_checkpoint
from xmodal.bench.serve import pictures

_MOST_CHANGE = 0.05  # of the server's memory after warming up
_HOSTILE = 0.2  # share of requests


def valid_requests(checkpoint: str, files: list[bytes]) -> list[tuple[bytes, bytes]]:
  """(request, its right response) of each picture and task, as predict computes them."""
  from xmodal.answers import answers
  from xmodal.data.pictures.decoded import DecodedPictures
  from xmodal.predictor import Predictor
  from xmodal.trained import without_flags

  opened = DecodedPictures()
  predictor, found = Predictor(checkpoint, opened), []
  for name in predictor.tasks:
    if name not in QUESTIONS:
      continue
    task, texts = predictor.task(name), QUESTIONS[name]
    asked = [(file, texts[number % len(texts)]) for number, file in enumerate(files)]
    queries = [task.query(*one) for one in asked]
    for (file, text), (_, examples), answer in zip(asked, queries, answers(
        predictor, opened, queries)):
      line = {'task': name, **task.plain(answer)}
      if notes := list(dict.fromkeys(n for example in examples for n in task.notes(example))):
        line['notes'] = [without_flags(note) for note in notes]
      body = predict_body(base64.b64encode(file).decode(), text, name)
      found.append((http_request(body), strict_json.dumps(line, ensure_ascii=False).encode()))
  return found


def hostile_requests() -> list[tuple[bytes, int]]:
  """(request, the status it should get) each."""
  picture = base64.b64encode(pictures()[0]).decode()
  bomb = bytearray(pictures()[0])
  bomb[16:24] = (60_000).to_bytes(4, 'big') * 2  # width and height in the header of a PNG
  bodies = [
      (b'{', 400), (b'\xff\xfe', 400), (b'{"options": ' + b'[' * 5000 + b']' * 5000 + b'}', 400),
      (json.dumps({'image': '/etc/passwd', 'text': 'a'}).encode(), 422),
      (json.dumps({'image': 'http://localhost/a.png', 'text': 'a'}).encode(), 422),
      (json.dumps({'image': base64.b64encode(bomb).decode(), 'text': 'a'}).encode(), 422),
      (json.dumps({'image': picture[:200], 'text': 'a'}).encode(), 422),
      (json.dumps({'image': picture, 'text': 'word ' * 10_000}).encode(), 422),
      (json.dumps({'image': picture, 'text': 5}).encode(), 422),
      (json.dumps({'image': picture, 'task': 'no', 'text': 'a'}).encode(), 404)]
  requests = [(http_request(body), status) for body, status in bodies]
  head = b'POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n'
  return requests + [
      (head + b'Content-Length: 999999999999\r\nConnection: close\r\n\r\n', 413),
      (head + b'X: ' + b'a' * 20_000 + b'\r\n\r\n', 431), (b'no HTTP\r\n\r\n', 400)]


class Soak:
  """What clients met.

  Attributes:
    counts: valid, hostile and left requests.
    faults: what was wrong, in words, with how often.
    memory: (seconds, bytes) of the server.
  """

  def __init__(self, server: ServerProcess, valid, hostile, seconds: float):
    self.counts, self.faults, self.memory = collections.Counter(), collections.Counter(), []
    self._server, self._valid, self._hostile = server, valid, hostile
    self._seconds = seconds

  async def run(self, clients: int) -> None:
    """Keeps the clients busy until the time is over."""
    self._began = time.perf_counter()
    await asyncio.gather(self._watch(), *(self._client(seed) for seed in range(clients)))

  @property
  def _goes_on(self):
    return time.perf_counter() - self._began < self._seconds

  async def _watch(self):
    while self._goes_on:
      self.memory.append((time.perf_counter() - self._began, self._server.resident_bytes()))
      await asyncio.sleep(min(1, self._seconds / 100))

  async def _client(self, seed):
    draw, client = random.Random(seed), Client(self._server.port)
    while self._goes_on:
      request, wanted = draw.choice(self._valid)
      if draw.random() < _HOSTILE:
        request, wanted = draw.choice(self._hostile)
        await self._hostile_one(request, wanted)
      elif draw.random() < 0.05:
        await self._leave(request, draw.random())
      else:
        await self._valid_one(client, request, wanted)
    client.close()

  async def _valid_one(self, client, request, wanted):
    self.counts['valid'] += 1
    try:
      status, body = await client.send(request)
    except Exception as error:
      self.faults[f'a valid request was lost: {type(error).__name__}'] += 1
      return
    if status != 200:
      self.faults[f'a valid request got {status}'] += 1
    elif body != wanted:
      self.faults['an answer differs from that of predict'] += 1

  async def _hostile_one(self, request, wanted):
    self.counts['hostile'] += 1
    client = Client(self._server.port)
    try:
      status, body = await client.send(request)
    except (OSError, asyncio.IncompleteReadError):
      # The server closes before all is sent where it has read enough.
      if wanted not in (400, 413, 431):
        self.faults[f'a request that should get {wanted} got no response'] += 1
      return
    finally:
      client.close()
    # A head that is too large ends before or after it is complete.
    if status != wanted and (status, wanted) != (400, 431):
      self.faults[f'a request that should get {wanted} got {status}'] += 1
    elif b'error' not in body or b'Traceback' in body:
      self.faults['a refusal is not in its form'] += 1

  async def _leave(self, request, share):
    self.counts['left'] += 1
    _, writer = await asyncio.open_connection('127.0.0.1', self._server.port)
    writer.write(request[:int(len(request) * share) + 1] if share < 0.5 else request)
    await writer.drain()
    writer.close()

  def change_of_memory(self) -> float:
    """The largest less the smallest memory after a fifth of the time, as a share of the latter."""
    sizes = [size for seconds, size in self.memory if seconds >= self._seconds / 5]
    return max(sizes) / min(sizes) - 1


def _run(options) -> int:
  check_positive(options, 'clients')
  with tempfile.TemporaryDirectory() as folder:
    checkpoint = options.checkpoint or make_checkpoint(os.path.join(folder, 'run'))
    valid, hostile = valid_requests(checkpoint, pictures()), hostile_requests()
    with ServerProcess(checkpoint, '--sizes', options.sizes) as server:
      server.wait_until_ready()
      soak = Soak(server, valid, hostile, 60 * options.minutes)
      asyncio.run(soak.run(options.clients))
      code = server.stop()
  change = soak.change_of_memory()
  print(', '.join(f'{number:,} {name}' for name, number in soak.counts.items()), 'requests in',
        f'{options.minutes:g} minutes; memory {soak.memory[-1][1] / 2**20:,.0f} MiB, changed by '
        f'{change:.1%} after the first fifth; exit code {code}')
  for fault, times in soak.faults.items():
    print(f'fault: {fault} ({times} times)')
  return int(bool(soak.faults) or change > _MOST_CHANGE or code != 0)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0; 1: it failed; 2: a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench soak', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', metavar='DIR', help='a workdir, or one of its '
                      'checkpoints/STEP folders')
  parser.add_argument('--minutes', type=float, default=60)
  parser.add_argument('--clients', type=int, default=16)
  parser.add_argument('--sizes', default='2,8,32', help='batch sizes of the server')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
