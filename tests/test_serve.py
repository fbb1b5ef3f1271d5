"""xmodal serve in this process: routes, batches, limits and hostile requests, with a stand-in for
the model; tests/test_serve_model.py has a real one."""

import asyncio
import base64
import concurrent.futures
import io
import json
import threading
import time
import tracemalloc
from unittest import mock
import zlib

import jsonschema
import numpy as np
import openapi_spec_validator
from PIL import Image
import pytest
from starlette.testclient import TestClient

from xmodal.errors import UserError
from xmodal.serve import bodies, forms, pictures
from xmodal.serve.app import Server
from xmodal.serve.engine import Engine, Facts
from xmodal.serve.events import Events
from xmodal.serve.limits import Admission, Limits, Refused, Room
from xmodal.serve.protocol import limited


def png(width=8, height=8, colour='red'):
  file = io.BytesIO()
  Image.new('RGB', (width, height), colour).save(file, 'PNG')
  return file.getvalue()


def as_text(data):
  return base64.b64encode(data).decode()


def bomb(side=60_000):
  """A PNG of a few hundred bytes whose header promises side x side pixels."""
  def chunk(name, data):
    return (len(data).to_bytes(4, 'big') + name + data
            + zlib.crc32(name + data).to_bytes(4, 'big'))
  header = side.to_bytes(4, 'big') * 2 + bytes((8, 2, 0, 0, 0))
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
          + chunk(b'IDAT', zlib.compress(bytes(10_000))) + chunk(b'IEND', b''))


class Echo(Engine):
  """Answers with what it was given. `gate` holds answers back while it is not set."""

  name, image_size, most_rows = 'echo', 32, 4
  tasks = {'vqa': Facts(reads_text=True), 'retrieval': Facts(ranks=True, reads_text=True),
           'captioning': Facts(writes=True),
           'generation': Facts(draws=True, options=('n', 'steps', 'guidance', 'mask'))}

  def __init__(self):
    self.gate, self.started, self.compiled = threading.Event(), threading.Event(), threading.Event()
    self.gate.set()
    self.compiled.set()
    self.batches = []

  def programs(self):
    return [self.compiled.wait]

  def answer(self, task, requests, on_step=None):
    self.started.set()
    self.gate.wait(20)
    self.batches.append((task, [request.text for request in requests]))
    if any(request.text == 'defect' for request in requests):
      raise KeyError('a secret of the insides')
    words = requests[0].text.split()
    for step in range(1, 4) if on_step else ():
      on_step(step, 3, np.zeros((1, 4, 4, 3), np.uint8) if task == 'generation' else
              [' '.join(words[:step])])
    return [UserError('text says nothing') if request.text == 'nothing' else
            {'answer': request.text, 'pictures': [len(picture) for picture in request.pictures]}
            for request in requests]


@pytest.fixture
def engine():
  engine = Echo()
  yield engine
  engine.gate.set()
  engine.compiled.set()


def ready(client):
  for _ in range(500):
    if client.get('/readyz').status_code == 200:
      return client
    time.sleep(0.01)
  raise AssertionError('never ready')


@pytest.fixture
def serve(engine):
  """Starts servers: serve(key=None, waiting=128, ...) -> client."""
  opened = []

  def start(key=None, wait_seconds=0.005, batching=True, **limits):
    server = Server(engine, Limits(**limits), key=key, wait_seconds=wait_seconds,
                    batching=batching)
    client = TestClient(server.app, raise_server_exceptions=False)
    client.server = server
    opened.append(client.__enter__())
    return ready(client)

  yield start
  engine.gate.set()
  for client in opened:
    client.__exit__(None, None, None)


ASKED = {'task': 'vqa', 'text': 'what?', 'image': as_text(png())}


def refused(response, status, code):
  """Checks that a response is one line of JSON with this status and code; returns the message."""
  assert response.status_code == status, response.text
  error, = response.json().values()
  assert set(error) == {'message', 'type', 'code'} and error['code'] == code, error
  assert '\n' not in error['message'] and 'Traceback' not in response.text
  return error['message']


# ---- routes


def test_a_picture_as_base64_as_a_data_url_and_as_an_upload(serve):
  client, data = serve(), png()
  wanted = {'task': 'vqa', 'answer': 'what?', 'pictures': [len(data)]}
  assert client.post('/v1/predict', json=ASKED).json() == wanted
  url = f'data:image/png;base64,{as_text(data)}'
  assert client.post('/v1/predict', json={**ASKED, 'image': url}).json() == wanted
  form = client.post('/v1/predict', data={'text': 'what?'}, files={'image': ('a.png', data)})
  assert form.json() == wanted  # the first task


def test_several_requests_in_a_call_keep_their_order(serve):
  asked = [{**ASKED, 'text': f'number {number}'} for number in range(7)]
  answers = serve().post('/v1/predict', json={'requests': asked}).json()['answers']
  assert [answer['answer'] for answer in answers] == [one['text'] for one in asked]


def test_several_pictures_are_ranked(serve):
  client, data = serve(), png()
  answer = client.post('/v1/predict', data={'task': 'retrieval', 'text': 'a'},
                       files=[('images', ('a.png', data)), ('images', ('b.png', data))]).json()
  assert len(answer['pictures']) == 2


CHAT = {'model': 'vqa', 'temperature': 0.3, 'messages': [
    {'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': [
        {'type': 'text', 'text': 'what?'},
        {'type': 'image_url', 'image_url': {
            'url': f'data:image/png;base64,{as_text(png())}', 'detail': 'low'}}]}]}


def test_a_chat_in_openais_form(serve):
  body = serve().post('/v1/chat/completions', json=CHAT).json()
  assert body['object'] == 'chat.completion' and body['model'] == 'vqa'
  choice, = body['choices']
  assert choice['message'] == {'role': 'assistant', 'content': 'what?'}
  assert choice['finish_reason'] == 'stop' and choice['index'] == 0


def test_a_chat_as_a_stream(serve):
  response = serve().post('/v1/chat/completions', json={**CHAT, 'stream': True})
  assert response.headers['content-type'].startswith('text/event-stream')
  *chunks, end = [line.removeprefix('data: ') for line in response.text.split('\n\n') if line]
  chunks = [json.loads(chunk) for chunk in chunks]
  assert end == '[DONE]' and {chunk['object'] for chunk in chunks} == {'chat.completion.chunk'}
  assert len({chunk['id'] for chunk in chunks}) == 1
  deltas = [chunk['choices'][0]['delta'] for chunk in chunks]
  assert deltas[0]['role'] == 'assistant'
  assert ''.join(delta.get('content', '') for delta in deltas) == 'what?'
  assert chunks[-1]['choices'][0]['finish_reason'] == 'stop'


def test_a_text_is_sent_as_it_is_written(serve):
  client = serve()
  said = {'type': 'text', 'text': 'a red circle'}
  chat = {**CHAT, 'model': 'captioning', 'stream': True, 'messages': [
      {'role': 'user', 'content': [said, CHAT['messages'][1]['content'][1]]}]}
  *lines, _ = [line for line in client.post('/v1/chat/completions', json=chat).text.split('\n\n')
               if line]
  deltas = [json.loads(line.removeprefix('data: '))['choices'][0]['delta'] for line in lines]
  assert [delta.get('content') for delta in deltas] == ['', 'a', ' red', ' circle', None]
  response = client.post('/v1/predict', json={
      'task': 'captioning', 'text': 'a red circle', 'image': as_text(png()), 'stream': True})
  events = [json.loads(part.split('data: ')[1]) for part in response.text.split('\n\n') if part]
  assert [event.get('text') for event in events] == ['a', 'a red', 'a red circle', None]
  assert events[-1]['answer'] == 'a red circle'


def test_a_later_question_is_about_the_last_picture(serve):
  more = [*CHAT['messages'], {'role': 'assistant', 'content': 'a'},
          {'role': 'user', 'content': 'and now?'}]
  body = serve().post('/v1/chat/completions', json={**CHAT, 'messages': more}).json()
  assert body['choices'][0]['message']['content'] == 'and now?'


def test_drawing_streams_its_steps_with_pictures(serve):
  response = serve().post('/v1/predict', json={'task': 'generation', 'text': 'a', 'stream': True})
  events = [dict(line.split(': ', 1) for line in part.split('\n'))
            for part in response.text.split('\n\n') if part]
  assert [event['event'] for event in events] == ['step'] * 3 + ['answer']
  step = json.loads(events[0]['data'])
  assert (step['step'], step['steps']) == (1, 3)
  assert Image.open(io.BytesIO(base64.b64decode(step['png']))).size == (4, 4)


def test_the_tasks_are_models(serve):
  body = serve().get('/v1/models').json()
  assert [model['id'] for model in body['data']] == ['vqa', 'retrieval', 'captioning', 'generation']
  assert {model['object'] for model in body['data']} == {'model'}


def test_the_routes_are_described(serve):
  client = serve()
  found = client.get('/openapi.json').json()
  openapi_spec_validator.validate(found)
  content = found['paths']['/v1/predict']['post']['requestBody']['content']
  assert {'application/json', 'multipart/form-data'} == set(content)
  assert {'Predict', 'Ask', 'Chat', 'Message'} <= set(found['components']['schemas'])
  assert client.get('/docs').status_code == 404  # FastAPI's loads scripts from another host


@pytest.mark.parametrize('method, path, body', [
    ('get', '/healthz', None), ('get', '/readyz', None), ('get', '/v1/models', None),
    ('post', '/v1/predict', ASKED), ('post', '/v1/predict', {'requests': [ASKED, ASKED]}),
    ('post', '/v1/predict', {}), ('post', '/v1/chat/completions', CHAT),
    ('post', '/v1/chat/completions', {})])
def test_answers_are_as_described(serve, method, path, body):
  client = serve()
  document = client.get('/openapi.json').json()
  response = client.request(method, path, json=body)
  responses = document['paths'][path][method]['responses']
  described = responses.get(str(response.status_code), responses['default'])
  schema = described['content']['application/json']['schema']
  assert schema
  jsonschema.validate(response.json(), {**schema, 'components': document['components']})


def test_the_key_is_described(serve):
  assert 'security' not in json.dumps(serve().get('/openapi.json').json())
  found = serve(key='a').get('/openapi.json', headers={'Authorization': 'Bearer a'}).json()
  openapi_spec_validator.validate(found)
  wanted = {path for path, operations in found['paths'].items()
            for operation in operations.values() if operation.get('security') == [{'key': []}]}
  assert wanted == {'/v1/models', '/v1/predict', '/v1/chat/completions', '/metrics'}


def test_the_page_may_load_nothing_from_elsewhere(serve):
  client = serve()
  for path, kind in (('/', 'html'), ('/page.js', 'javascript'), ('/page.css', 'css')):
    response = client.get(path)
    assert kind in response.headers['content-type']
    assert "default-src 'none'" in response.headers['content-security-policy']
    assert 'http://' not in response.text and 'https://' not in response.text


def test_it_is_alive_before_it_is_ready(engine):
  engine.compiled.clear()
  server = Server(engine, Limits())
  with TestClient(server.app) as client:
    assert client.get('/healthz').status_code == 200
    refused(client.get('/readyz'), 503, 'not_ready')
    response = client.post('/v1/predict', json=ASKED)
    refused(response, 503, 'not_ready')
    assert int(response.headers['retry-after']) > 0
    engine.compiled.set()
    ready(client)


def test_a_model_that_cannot_be_compiled_is_told_and_started_again(engine, caplog):
  def fail():
    raise RuntimeError('a secret of the insides')

  engine.programs = lambda: [fail]
  with TestClient(Server(engine, Limits()).app) as client:
    wait_for(lambda: client.get('/healthz').status_code != 200)
    for response in (client.get('/healthz'), client.get('/readyz'),
                     client.post('/v1/predict', json=ASKED)):
      assert 'RuntimeError while compiling' in refused(response, 503, 'cannot_compile')
      assert 'retry-after' not in response.headers
  assert 'a secret of the insides' in caplog.text


def test_metrics_count_requests_batches_and_errors(serve):
  client = serve()
  client.post('/v1/predict', json=ASKED)
  client.post('/v1/predict', json={**ASKED, 'text': 'nothing'})
  text = client.get('/metrics').text
  for line in ('xmodal_requests_total{route="/v1/predict",status="200",task="vqa"} 1.0',
               'xmodal_requests_total{route="/v1/predict",status="422",task="vqa"} 1.0',
               'xmodal_errors_total{code="invalid"} 1.0', 'xmodal_queue_length 0.0',
               'xmodal_batch_rows_count{task="vqa"} 2.0',
               'xmodal_request_seconds_count{route="/v1/predict"} 2.0'):
    assert line in text.splitlines(), text


# ---- batches


def ask_together(client, bodies):
  with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
    return list(pool.map(lambda body: client.post('/v1/predict', json=body), bodies))


def wait_for(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_requests_that_wait_share_batches_of_one_task(serve, engine):
  client = serve()
  engine.gate.clear()
  asked = [{**ASKED, 'text': str(number)} for number in range(9)]
  other = {'task': 'retrieval', 'text': 'other', 'image': ASKED['image']}
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    first = pool.submit(client.post, '/v1/predict', json=asked[0])
    assert engine.started.wait(20)
    rest = [pool.submit(client.post, '/v1/predict', json=body) for body in [*asked[1:], other]]
    wait_for(lambda: len(client.server.batcher) == 9)
    engine.gate.set()
    answers = [future.result().json()['answer'] for future in [first, *rest]]
  assert answers == [*map(str, range(9)), 'other']
  sizes = [(task, len(texts)) for task, texts in engine.batches]
  assert sizes[0] == ('vqa', 1) and sorted(sizes[1:]) == [('retrieval', 1), ('vqa', 4), ('vqa', 4)]


def test_a_lone_request_does_not_wait_for_others(serve):
  client = serve(wait_seconds=30)
  assert client.post('/v1/predict', json=ASKED).status_code == 200  # in less than 30 s


def test_without_batching_each_request_is_alone(serve, engine):
  client = serve(batching=False)
  ask_together(client, [ASKED] * 5)
  assert [len(texts) for _, texts in engine.batches] == [1] * 5


def test_a_failing_batch_does_not_end_the_server(serve, caplog):
  client = serve()
  response = client.post('/v1/predict', json={**ASKED, 'text': 'defect'})
  assert 'secret' not in response.text
  refused(response, 500, 'failed')
  assert 'a secret of the insides' in caplog.text  # for the one who runs it
  assert client.post('/v1/predict', json=ASKED).status_code == 200


def test_a_defect_before_a_response_begins_is_told_as_any_other(serve, caplog):
  client = serve()

  async def broken(scope, receive, send):
    raise KeyError('a secret of the insides')

  client.server.app._app = broken
  response = client.get('/healthz')
  refused(response, 500, 'failed')
  assert 'secret' not in response.text and 'a secret of the insides' in caplog.text


# ---- limits


def test_too_many_calls(serve, engine):
  client = serve(waiting=2)
  engine.gate.clear()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    held = [pool.submit(client.post, '/v1/predict', json=ASKED) for _ in range(2)]
    wait_for(lambda: client.server.admission.calls == 2)
    response = client.post('/v1/predict', json=ASKED)
    refused(response, 503, 'overloaded')
    assert response.headers['retry-after'] == '1'
    engine.gate.set()
    assert [future.result().status_code for future in held] == [200, 200]
  wait_for(lambda: client.server.admission.calls == 0)
  assert client.server.admission.held == 0


def test_an_answer_that_takes_too_long(serve, engine):
  client = serve(answer_seconds=0.1)
  engine.gate.clear()
  refused(client.post('/v1/predict', json=ASKED), 504, 'late')


@pytest.fixture
def decoding(monkeypatch):
  """Decoding begins, and goes on until the event `go` is set."""
  begun, go = threading.Semaphore(0), threading.Event()
  decode = pictures.images.decode

  def slow(*args):
    begun.release()
    assert go.wait(20)
    return decode(*args)

  monkeypatch.setattr(pictures.images, 'decode', slow)
  yield begun, go
  go.set()


def test_a_picture_that_takes_too_long_to_decode(serve, decoding):
  begun, go = decoding
  client = serve(answer_seconds=0.1)
  body = {'task': 'retrieval', 'text': 'a', 'images': [ASKED['image']] * 3}
  refused(client.post('/v1/predict', json=body), 504, 'late')
  assert client.server.admission.calls == 1  # its thread still holds memory
  go.set()
  wait_for(lambda: client.server.admission.calls == client.server.admission.held == 0)
  assert begun.acquire(timeout=0) and not begun.acquire(timeout=0)  # the first picture alone


def test_a_client_that_leaves_while_its_picture_is_decoded(serve, decoding):
  begun, _ = decoding
  client, sent = serve(), []
  messages = [{'type': 'http.request', 'body': json.dumps(ASKED).encode()}]

  async def receive():
    if messages:
      return messages.pop()
    assert await asyncio.to_thread(begun.acquire, timeout=20)
    return {'type': 'http.disconnect'}

  async def send(message):
    sent.append(message)

  asyncio.run(client.server.app({
      'type': 'http', 'method': 'POST', 'path': '/v1/predict', 'raw_path': b'/v1/predict',
      'query_string': b'', 'headers': []}, receive, send))
  assert sent[0]['status'] == 499


def test_a_stream_that_is_not_read_ends(engine):
  admission, closed = Admission(Limits()), []

  async def events():
    try:
      yield b'data: a\n\n'
    finally:
      closed.append(True)

  async def send(message):
    if message['type'] == 'http.response.body':
      await asyncio.Event().wait()  # the client's buffers are full

  asyncio.run(asyncio.wait_for(Events(events(), admission.enter(), 0.05)({}, None, send), 20))
  assert closed and admission.calls == 0


def test_a_client_that_reads_steadily_is_not_cut_off():
  protocol, timers, transport = object.__new__(limited(Limits())), [], mock.Mock()
  protocol.loop, protocol.flow, protocol.transport = mock.Mock(), mock.Mock(), transport
  protocol.loop.call_later = lambda seconds, *timer: timers.append(timer)
  protocol.transport.get_write_buffer_size.side_effect = [  # bytes that are left
      900_000, 600_000, 600_000, 300_000, 300_000, 290_000]
  protocol.pause_writing()
  for cut in (0, 0, 1):
    call, before = timers.pop()
    call(before)
    assert transport.abort.call_count == cut


def test_a_client_that_leaves_takes_its_work_along(engine):
  admission = Admission(Limits())
  server = Server(engine, Limits())
  server.batcher.start()
  assert server.batcher.ready.wait(20)
  engine.gate.clear()
  server.batcher.submit('vqa', forms.Request((), 'first'))
  assert engine.started.wait(20)
  left = server.batcher.submit('vqa', forms.Request((), 'left'))
  last = server.batcher.submit('vqa', forms.Request((), 'last'))
  assert left.cancel()  # as a handler does
  engine.gate.set()
  assert last.result(20)['answer'] == 'last'
  assert 'left' not in [text for _, texts in engine.batches for text in texts]
  assert server.batcher.close(20) and admission.calls == 0


def test_closing_answers_what_is_queued(engine):
  server = Server(engine, Limits())
  server.batcher.start()
  engine.gate.clear()
  futures = [server.batcher.submit('vqa', forms.Request((), str(i))) for i in range(6)]
  threading.Timer(0.1, engine.gate.set).start()
  assert server.batcher.close(20)
  assert [future.result(0)['answer'] for future in futures] == list(map(str, range(6)))


def test_held_bytes_are_given_back():
  admission = Admission(Limits(held_bytes=100))
  call, other = admission.enter(), admission.enter()
  call.hold(80)
  with pytest.raises(Refused) as error:
    other.hold(30)
  assert error.value.status == 503
  call.leave()
  call.leave()
  other.hold(30)
  other.leave()
  assert (admission.calls, admission.coming, admission.held) == (0, 0, 0)


def test_work_waits_for_memory_and_the_largest_runs_alone():
  room, order = Room(100), []
  began, end = threading.Event(), threading.Event()

  def work(count):
    with room.taken(count):
      order.append(count)
      began.set()
      assert end.wait(20)
      order.append(-count)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(work, 60)
    assert began.wait(20)
    with room.taken(40):  # as much as is left
      pass
    second = pool.submit(work, 1000)
    wait_for(lambda: room._changed._waiters)
    end.set()
    first.result(20), second.result(20)
  assert order == [60, -60, 1000, -1000]


@pytest.mark.parametrize('file, mode, size', [
    ('PNG', 'RGBA', 28), ('JPEG', 'CMYK', 28), ('JPEG', 'RGB', 10)])
def test_memory_for_decoding_is_taken_before_it(serve, monkeypatch, file, mode, size):
  taken, decode = [], pictures.images.decode
  client = serve()
  room = client.server._room
  monkeypatch.setattr(pictures.images, 'decode', lambda *args: (
      taken.append((room._size - room._free) / 16 / 16), decode(*args))[1])
  data = io.BytesIO()
  Image.new(mode, (16, 16)).save(data, file)
  body = {**ASKED, 'image': as_text(data.getvalue())}
  assert client.post('/v1/predict', json=body).status_code == 200
  assert taken == [size] and room._free == room._size


def test_few_threads_decode_on_a_large_machine(engine, monkeypatch):
  for number, threads in ((1, 1), (2, 2), (64, 4)):
    monkeypatch.setattr('xmodal.serve.app.cores', lambda number=number: number)
    assert Server(engine, Limits())._pool._max_workers == threads


@pytest.mark.parametrize('limits, body, status, code', [
    (dict(body_bytes=1000), {**ASKED, 'text': 'x' * 2000}, 413, 'too_large'),
    (dict(pixels=100), {**ASKED, 'image': as_text(png(11, 10))}, 422, 'too_many_pixels'),
    (dict(text=10), {**ASKED, 'text': 'x' * 11}, 422, 'text_too_long'),
    (dict(requests=2), {'requests': [ASKED] * 3}, 422, 'too_many_requests'),
    (dict(), {'requests': []}, 422, 'too_many_requests'),
    (dict(requests=2), {'requests': [5] * 3}, 422, 'too_many_requests'),  # none is looked at
    (dict(pictures=2), {'task': 'retrieval', 'text': 'a', 'images': [ASKED['image']] * 3}, 422,
     'too_many_pictures'),
    (dict(steps=5), {'task': 'generation', 'text': 'a', 'options': {'steps': 6}}, 422, 'invalid'),
    (dict(drawn=2), {'task': 'generation', 'text': 'a', 'options': {'n': 3}}, 422, 'invalid'),
    (dict(held_bytes=300), ASKED, 503, 'overloaded'),
])
def test_limits_of_a_body(serve, limits, body, status, code):
  refused(serve(**limits).post('/v1/predict', json=body), status, code)


# ---- hostile requests


def test_a_decompression_bomb_is_refused_by_its_header(serve):
  client = serve()
  for side in (60_000, 10_000):  # beyond Pillow's own limit, and beyond ours alone
    began = time.process_time()
    refused(client.post('/v1/predict', json={**ASKED, 'image': as_text(bomb(side))}), 422,
            'too_many_pixels')
    assert time.process_time() - began < 2  # its pixels were never made


def progressive(repeats):
  """A JPEG whose last scan is there several times."""
  file = io.BytesIO()
  Image.new('RGB', (32, 32), 'red').save(file, 'JPEG', progressive=True)
  data = file.getvalue()
  last = data.rindex(b'\xff\xda')
  return data[:last] + data[last:-2] * repeats + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(serve, monkeypatch):
  client = serve()
  comment = b'\xff\xfe' + (2 + 300).to_bytes(2, 'big') + b'\xff\xda\x00' * 100
  good = progressive(1)
  for data in (good, good[:2] + comment + good[2:], good + b'\xff\xda\x00' * 100):
    answer = client.post('/v1/predict', json={**ASKED, 'image': as_text(data)})
    assert answer.status_code == 200, answer.text
  monkeypatch.setattr(pictures.images, 'decode', None)
  empty = b'\xff\xfe\x00\x02' * 1001
  for data in (progressive(60), good[:2] + empty + good[2:]):
    refused(client.post('/v1/predict', json={**ASKED, 'image': as_text(data)}), 422,
            'too_many_scans')


@pytest.mark.parametrize('image', [
    '/etc/passwd', '../../etc/passwd', 'picture.png', 'C:\\a.png', '~/a.png'])
def test_a_path_is_no_picture(serve, image, tmp_path, monkeypatch):
  (tmp_path / 'picture.png').write_bytes(png())
  monkeypatch.chdir(tmp_path)
  client = serve()
  response = client.post('/v1/predict', json={**ASKED, 'image': image})
  assert response.status_code == 422 and 'root' not in response.text
  mask = {'task': 'generation', 'text': 'a', 'image': ASKED['image'], 'options': {'mask': image}}
  assert client.post('/v1/predict', json=mask).status_code == 422


@pytest.mark.parametrize('address', [
    'http://localhost/a.png', 'https://localhost/a.png', 'file:///etc/passwd', 'ftp://localhost/a',
    'gs://bucket/a.png', 's3://bucket/a.png', 'data:text/plain;base64,YQ==', 'FILE:/etc/passwd'])
def test_no_address_is_opened(serve, address):
  client = serve()
  refused(client.post('/v1/predict', json={**ASKED, 'image': address}), 422, 'no_addresses')
  chat = {'model': 'vqa', 'messages': [{'role': 'user', 'content': [
      {'type': 'image_url', 'image_url': {'url': address}}]}]}
  refused(client.post('/v1/chat/completions', json=chat), 422, 'no_addresses')


@pytest.mark.parametrize('data', [
    b'', b'no picture', png()[:40], b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',
    b'\xff\xd8\xff' + bytes(50), b'<svg xmlns="http://www.w3.org/2000/svg"/>'])
def test_files_that_are_no_pictures(serve, data):
  client = serve()
  response = client.post('/v1/predict', data={'text': 'a'}, files={'image': ('a.png', data)})
  refused(response, 422, 'no_picture')


@pytest.mark.parametrize('body, code', [
    (b'', 'no_json'), (b'{', 'no_json'), (b'[1]', 'no_object'), (b'"a"', 'no_object'),
    (b'{"text": NaN}', 'no_json'), (b'{"text": "\xff\xfe"}', 'no_utf8'),
    (b'{"n": ' + b'1' * 5000 + b'}', 'no_json'),
    (b'{"options": ' + b'[' * 100_000 + b']' * 100_000 + b'}', 'too_many_values'),
    (b'{"options": ' + b'[' * 5_000 + b']' * 5_000 + b'}', 'too_deep'),
    (b'{"options": ' + b'{"a":' * 30 + b'1' + b'}' * 30 + b'}', 'too_deep')])
def test_bodies_that_are_no_json(serve, body, code):
  client = serve()
  for route in ('/v1/predict', '/v1/chat/completions'):
    refused(client.post(route, content=body), 400, code)


@pytest.mark.parametrize('body', [
    b'{"requests": [' + b'{},' * 1_000_000 + b'{}]}',
    b'{"messages": [' + b'{"role":"a"},' * 200_000 + b'{}]}',
    b'{"options": {' + b'"":1,' * 500_000 + b'"":1}}',
    b'{"options": [' + b'0,' * 1_000_000 + b'0]}'])
def test_wide_json_takes_no_memory(body):
  tracemalloc.start()
  try:
    with pytest.raises(Refused) as error:
      bodies.parse_json(body, Limits())
    assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
  finally:
    tracemalloc.stop()
  assert error.value.code == 'too_many_values'


def test_names_and_values_of_json_are_counted():
  value = {'a "quoted, [name]': [1, -2.5e3, None, {'text': 'x, y: {z} \\'}, [[]]]}
  body = json.dumps(value, indent=2)
  assert bodies.parse_json(body.encode(), Limits(values=11)) == value
  with pytest.raises(Refused, match='more than 10 names and values'):
    bodies.parse_json(body.encode(), Limits(values=10))


@pytest.mark.parametrize('change', [
    {'text': 5}, {'text': None}, {'image': 5}, {'image': ['a']}, {'images': 'a'}, {'options': []},
    {'options': {'n': 1}}, {'details': 'yes'}, {'unknown': 1}, {'task': ['vqa']},
    {'requests': 'a'}, {'requests': [5]}, {'image': ''}, {'image': None}, {'text': 'nothing'},
    {'image': ASKED['image'], 'images': [ASKED['image']]}])
def test_wrong_types_and_missing_things(serve, change):
  response = serve().post('/v1/predict', json={**ASKED, **change})
  assert response.status_code == 422, response.text
  refused(response, 422, response.json()['error']['code'])


@pytest.mark.parametrize('options', [
    {'n': True}, {'n': '2'}, {'n': 1.5}, {'n': 0}, {'steps': -1}, {'guidance': 1e9},
    {'guidance': [1]}, {'mask': 5}])
def test_wrong_options_of_drawing(serve, options):
  body = {'task': 'generation', 'text': 'a', 'options': options}
  assert serve().post('/v1/predict', json=body).status_code == 422


@pytest.mark.parametrize('change', [
    {'messages': []}, {'messages': 'a'}, {'messages': [{'role': 'user'}]}, {'model': 5},
    {'messages': [{'role': 'user', 'content': [{'type': 'input_audio'}]}]}, {'n': 2},
    {'messages': [{'role': 'assistant', 'content': 'a'}]}])
def test_wrong_chats(serve, change):
  assert serve().post('/v1/chat/completions', json={**CHAT, **change}).status_code == 422


def test_an_unknown_task(serve):
  client = serve()
  refused(client.post('/v1/predict', json={**ASKED, 'task': 'no'}), 404, 'no_task')
  refused(client.post('/v1/chat/completions', json={**CHAT, 'model': 'gpt-4o'}), 404, 'no_task')
  refused(client.get('/v1/no'), 404, 'no_route')
  refused(client.get('/v1/predict'), 405, 'no_route')


@pytest.mark.parametrize('body', [
    b'', b'--x', b'--x\r\n\r\n', b'no boundary at all',
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
    b'--x\r\nA: b' + b'\r\nA: b' * 20 + b'\r\n\r\n\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n\r\n' * 300 + b'--x--\r\n'])
def test_damaged_forms(serve, body):
  response = serve().post('/v1/predict', content=body,
                          headers={'content-type': 'multipart/form-data; boundary=x'})
  refused(response, 400, 'no_form')


def test_a_form_that_names_no_boundary(serve):
  response = serve().post('/v1/predict', content=b'a',
                          headers={'content-type': 'multipart/form-data'})
  refused(response, 400, 'no_form')


def test_a_form_keeps_all_bytes_of_a_file():
  content = bytes(range(256)) * 100 + b'\r\n--x\r\n\n--y'
  body = (b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n'
          b'Content-Type: image/png\r\n\r\n' + content + b'\r\n--xyz\r\n'
          b'Content-Disposition: form-data; name="text"\r\n\r\nh\xc3\xa9\r\n--xyz--\r\n')
  assert bodies.parse_form(body, 'multipart/form-data; boundary=xyz') == [
      ('image', True, content), ('text', False, 'h\u00e9'.encode())]


def test_a_question_of_ten_thousand_words(serve):
  refused(serve().post('/v1/predict', json={**ASKED, 'text': 'word ' * 10_000}), 422,
          'text_too_long')


def test_half_a_character(serve):
  client = serve()
  body = json.dumps({**ASKED, 'text': 'half \ud83d'})
  refused(client.post('/v1/predict', content=body,
                      headers={'Content-Type': 'application/json'}), 422, 'invalid')


def test_a_request_that_fails_does_not_fail_the_others_of_its_batch(engine, serve):
  client = serve()
  answer = client.post('/v1/predict', json={'requests': [
      {**ASKED, 'text': 'one'}, {**ASKED, 'text': 'defect'}]})
  refused(answer, 500, 'failed')
  assert ('vqa', ['one']) in engine.batches  # once more, by itself


# ---- keys and foreign pages


def test_a_key(serve):
  client = serve(key='s\u00e9cret')
  given = {'Authorization': 'Bearer s\u00e9cret'.encode()}
  for headers in ({}, {'Authorization': 'Bearer no'}, {'Authorization': 's\u00e9cret'.encode()}):
    for path in ('/v1/models', '/metrics', '/openapi.json'):
      response = client.get(path, headers=headers)
      refused(response, 401, 'invalid_api_key')
      assert response.headers['www-authenticate'] == 'Bearer'
    refused(client.post('/v1/predict', json=ASKED, headers=headers), 401, 'invalid_api_key')
  assert client.post('/v1/predict', json=ASKED, headers=given).status_code == 200
  for path in ('/', '/page.js', '/healthz', '/readyz'):
    assert client.get(path).status_code == 200


def test_a_page_of_another_host_cannot_use_it(serve):
  client = serve()
  own = {'Origin': 'http://testserver'}
  assert client.post('/v1/predict', json=ASKED, headers=own).status_code == 200
  for origin in ('http://evil.example', 'null', 'http://[', 'http://', 'http://[::1]:x'):
    refused(client.post('/v1/predict', json=ASKED, headers={'Origin': origin}), 403,
            'foreign_page')


def test_a_name_that_is_made_to_mean_this_machine(engine):
  with TestClient(Server(engine, Limits(), only_local=True).app,
                  base_url='http://evil.example:8000') as client:
    refused(client.get('/v1/models'), 403, 'foreign_host')
    refused(client.get('/v1/models', headers={'Host': '[::1'}), 403, 'foreign_host')
    for host in ('localhost:8000', '127.0.0.1', '[::1]:8000'):
      assert client.get('/v1/models', headers={'Host': host}).status_code == 200


def test_a_large_head(serve):
  response = serve().get('/healthz', headers={f'x-{i}': 'a' * 100 for i in range(300)})
  refused(response, 431, 'large_head')
