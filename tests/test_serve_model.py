"""xmodal serve with a model: its answers are those of predict, to the bit; its process, its
connections and its signals."""

import base64
import concurrent.futures
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import httpx
import numpy as np
from PIL import Image
import pytest
from served import ROOT, Served, make_run

from xmodal import export, predict
from xmodal.answers import answers
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.predictor import Predictor
from xmodal.serve.__main__ import main
from xmodal.serve.engine import Picture, Request, open_engine
from xmodal.serve.limits import Limits, Room
from xmodal.serve.pictures import Opening, decoded

TEXTS = {'vqa': ['how many circles?', 'what is red?', 'is there a square?'],
         'detection': ['red circle. blue square.', 'red circle. blue square.', 'a cat.'],
         'captioning': [''], 'retrieval': ['a red circle. a cat.', 'a dog.']}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('served') / 'run')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Twelve pictures of different sizes."""
  folder = tmp_path_factory.mktemp('pictures')
  source = Shapes('val', size=12, image_size=32)
  for number in range(12):
    picture = Image.fromarray(source[number].image)
    picture.resize((40 + 5 * number, 64)).save(folder / f'{number}.png')
  return [folder / f'{number}.png' for number in range(12)]


@pytest.fixture(scope='module')
def engine(run):
  return open_engine(run, (2, 8))


def opened(engine, path) -> Picture:
  return decoded(path.read_bytes(), 'image',
                 Opening(engine.image_size, Limits(), lambda n: None, Room(2**30)))


@pytest.mark.parametrize('task', list(TEXTS))
def test_answers_are_predicts_whatever_else_is_in_the_batch(engine, run, files, task):
  """As bytes of JSON: `xmodal predict --input` computes batches of 32."""
  pictures = DecodedPictures()
  predictor = Predictor(run, pictures)
  texts = [TEXTS[task][number % len(TEXTS[task])] for number in range(len(files))]
  own = predictor.task(task)
  wanted = [json.dumps(own.plain(answer)) for answer in answers(
      predictor, pictures, (own.query(str(path), text) for path, text in zip(files, texts)))]
  requests = [Request((opened(engine, path),), text) for path, text in zip(files, texts)]
  for size in (1, 2, 7, 12):
    found = []
    for start in range(0, len(requests), size):
      found += engine.answer(task, requests[start:start + size])
    assert [json.dumps(answer) for answer in found] == wanted, size


def test_pictures_are_ranked_as_predict_ranks_them(engine, files, run):
  request = Request(tuple(opened(engine, path) for path in files[:5]), 'a red circle.')
  answer, = engine.answer('retrieval', [request])
  model = Predictor(run)
  task, examples = model.task('retrieval').query([str(path) for path in files[:5]],
                                                 'a red circle.')
  _, predictions = model(examples, task)
  wanted = task.plain(task.join(examples, predictions))['pictures']
  for match in wanted:  # the place in the list, where predict names the file
    match['image'] = [str(path) for path in files].index(match['image'])
  assert answer == {'pictures': wanted}


def test_a_caption_is_told_as_it_is_written(engine, files):
  request, steps = Request((opened(engine, files[0]),)), []
  answer, = engine.answer('captioning', [request], lambda *step: steps.append(step))
  assert [answer] == engine.answer('captioning', [request])
  texts = [texts[0] for _, _, texts in steps]
  assert texts[-1] == answer['caption'] and len(texts) > 1
  assert [step for step, _, _ in steps] == list(range(1, len(texts) + 1))
  assert all(later.startswith(text) for text, later in zip(texts, texts[1:]))


def test_drawing_is_predicts_and_tells_its_steps(engine, run, tmp_path):
  output, steps = tmp_path / 'a.png', []
  assert predict.main(['--checkpoint', str(run), '--text', 'a red circle', '--seed', '3',
                       '--task', 'generation', '--steps', '4', '--output', str(output)]) == 0
  request = Request((), 'a red circle', {'seed': 3, 'steps': 4})
  answer, = engine.answer('generation', [request], lambda *step: steps.append(step))
  drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer['png']))))
  assert [(step, of) for step, of, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
  np.testing.assert_array_equal(steps[-1][2][0], drawn)
  assert (np.asarray(Image.open(output).convert('RGB')) == drawn).all()


def test_a_mask_is_a_picture_in_memory(engine, files):
  picture, white = opened(engine, files[0]), io.BytesIO()
  Image.new('L', (40, 64), 255).save(white, 'PNG')
  mask = Picture(white.getvalue(), picture.decoded)
  answer, = engine.answer('generation', [Request((picture,), 'a', {'mask': mask, 'steps': 2})])
  assert 'png' in answer


def test_the_settings_of_a_drawing_compile_nothing(engine, files):
  picture, white = opened(engine, files[0]), io.BytesIO()
  Image.new('L', (40, 64), 255).save(white, 'PNG')
  mask = Picture(white.getvalue(), picture.decoded)
  requests = [Request((), 'a'), Request((), 'a', {'guidance': 2.5}), Request((), 'a', {'steps': 3}),
              Request((), 'a', {'guidance': 7, 'steps': 4, 'seed': 5}),
              Request((picture,), 'a', {'strength': 0.3}),
              Request((picture,), 'a', {'strength': 0.9, 'steps': 5}),
              Request((picture,), 'a', {'mask': mask, 'guidance': 1.5})]
  programs = set()
  for request in requests:
    assert engine.answer('generation', [request])[0]['png']
    asked, _ = engine._query(engine._predictor.task('generation'), request, False)
    programs.add(engine._predictor.program(asked))
  program, = programs
  assert program._cache_size() == 2  # from noise, and from a picture


def test_mistakes_are_told_in_words_of_a_request(engine, files):
  picture = opened(engine, files[0])
  for request, start in (
      (Request((picture,), ''), 'text is empty'), (Request((), 'a'), 'there is no picture'),
      (Request((picture, picture), 'a'), '2 pictures; vqa wants one'),
      (Request((picture,), 'a', {'n': 2}), 'n means nothing to vqa')):
    good, bad = engine.answer('vqa', [Request((picture,), 'what?'), request])
    assert 'answer' in good and isinstance(bad, UserError) and str(bad).startswith(start)
  names = ' '.join(f'thing {number}.' for number in range(40))
  error, = engine.answer('detection', [Request((picture,), names)])
  assert 'wanted up to 32' in str(error)


def test_details_hold_boxes_below_the_threshold(engine, files):
  picture = opened(engine, files[0])
  plain, = engine.answer('detection', [Request((picture,), 'red circle.')])
  more, = engine.answer('detection', [Request((picture,), 'red circle.', details=True)])
  shown = [one for one in more['candidates'] if one['score'] >= more['threshold']]
  assert plain['found'] == more['found'] == shown and len(more['candidates']) > len(shown)
  answer, = engine.answer('vqa', [Request((picture,), 'what?', details=True)])
  assert answer['top'][0] == [answer['answer'], answer['probability']]


@pytest.fixture(scope='module')
def bundle(run, tmp_path_factory):
  bundle = tmp_path_factory.mktemp('exported') / 'bundle'
  assert export.main(['--checkpoint', run, '--output', str(bundle), '--tasks', 'vqa,detection',
                      '--platforms', 'cpu', '--sizes', '2']) == 0
  return bundle


def test_a_bundle_is_served(bundle, files, engine, tmp_path):
  # Training decodes a JPEG of this size at 3/8, which Pillow by itself cannot.
  photo = Image.fromarray(Shapes('val', size=1, image_size=96)[0].image)
  photo.save(tmp_path / 'a.jpg')
  served = open_engine(str(bundle), ())
  assert served.name == 'bundle' and set(served.tasks) == {'vqa', 'detection'}
  assert served.tasks['vqa'] == engine.tasks['vqa']
  requests = [Request((opened(engine, path),), TEXTS['vqa'][0])
              for path in (*files[:3], tmp_path / 'a.jpg')]
  for ours, others in zip(served.answer('vqa', requests), engine.answer('vqa', requests)):
    assert ours['answer'] == others['answer']
    assert ours['probability'] == pytest.approx(others['probability'], abs=1e-5)
  for task in served.tasks:
    detailed = [Request(requests[0].pictures, TEXTS[task][0], details=True)]
    (ours,), (others,) = (one.answer(task, detailed) for one in (served, engine))
    assert ours.keys() == others.keys() > served.answer(task, [requests[0]])[0].keys()
  dots = Request(requests[0].pictures, 'what is it' + '.' * 40)  # not split
  assert 'answer' in served.answer('vqa', [dots])[0]
  names = [f'thing {number}' for number in range(33)]
  for end in ('. ', ';', '\n', '\u3002'):
    error, = served.answer('detection', [Request(requests[0].pictures, end.join(names))])
    assert str(error) == 'the text has 33 parts; wanted up to 32 in one request'
  wrong, right = served.answer('vqa', [Request(requests[0].pictures, ' '), requests[1]])
  assert isinstance(wrong, UserError) and right['answer']
  with pytest.raises(UserError, match='--precision means nothing for the bundle'):
    open_engine(str(bundle), (), 'int8')
  damaged = shutil.copytree(bundle, tmp_path / 'damaged')
  (damaged / 'bundle.json').write_text('{"format": 1}')
  with pytest.raises(UserError, match='bundle.json: damaged'):
    open_engine(str(damaged), ())


def test_a_bundle_starts_with_a_warm_cache_and_gives_details(bundle, files, tmp_path):
  served = Served(bundle, JAX_COMPILATION_CACHE_DIR=None, XDG_CACHE_HOME=str(tmp_path),
                  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=None).wait_until_ready()
  body = asked(files, task='detection', text='red circle.', details=True)
  answer = httpx.post(f'{served.address}/v1/predict', json=body, timeout=60).json()
  assert answer['candidates'] and 0 <= answer['threshold'] <= 1
  assert served.stop() == (0, '')
  assert list(tmp_path.glob('xmodal/jax/*-cache'))


# ---- the process


@pytest.fixture(scope='module')
def served(run):
  served = Served(run, '--sizes', '2', '--header_seconds', '1', '--body_seconds', '1',
                  '--read_seconds', '1', '--body_bytes', '1000000', '--connections', '30')
  yield served.wait_until_ready()
  code, err = served.stop()
  assert (code, err) == (0, '')


def asked(files, **more):
  image = base64.b64encode(files[0].read_bytes()).decode()
  return {'task': 'vqa', 'text': 'how many circles?', 'image': image, **more}


def test_answers_over_the_network_are_equal_under_load(served, files):
  with concurrent.futures.ThreadPoolExecutor(8) as pool, httpx.Client() as client:
    answers = list(pool.map(lambda _: client.post(
        f'{served.address}/v1/predict', json=asked(files), timeout=60).text, range(40)))
  assert len(set(answers)) == 1 and 'probability' in answers[0]


def exchange(served, *parts, wait=10.0):
  """Sends bytes as they are, and returns all that comes back until the server closes."""
  with socket.create_connection(('127.0.0.1', served.port), timeout=wait) as connection:
    for part in parts:
      connection.sendall(part)
    found = b''
    while more := connection.recv(65536):
      found += more
  return found.decode()


GET = b'GET / HTTP/1.1\r\nHost: localhost\r\n'
POST = b'POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n'


@pytest.mark.parametrize('parts, status, code', [
    ((), 408, 'slow_head'),
    ((GET,), 408, 'slow_head'),
    ((POST + b'Content-Length: 1000\r\n\r\n{',), 408,
     'slow_body'),
    ((POST + b'Content-Length: 999999999999\r\n\r\n{',), 413,
     'too_large'),
    ((POST + b'Transfer-Encoding: chunked\r\n\r\n',
      (b'8000\r\n' + b'x' * 0x8000 + b'\r\n') * 40), 413, 'too_large'),
    ((GET + b''.join(b'X%d: y\r\n' % i for i in range(9000)),), 400,
     'no_http'),
    ((b'no HTTP\r\n\r\n',), 400, 'no_http'), ((b'\xff\xfe\x00\r\n\r\n',), 400, 'no_http'),
    ((POST + b'Content-Length: -1\r\n\r\n',), 400, 'no_http'),
    ((POST + b'Connection: close\r\nContent-Length: 4\r\n\r\n'
      b'\xff\xfe{}',), 400, 'no_utf8')])
def test_connections_that_are_slow_endless_or_damaged(served, parts, status, code):
  try:
    response = exchange(served, *parts)
  except (ConnectionResetError, BrokenPipeError):  # it refused before we had sent all
    assert status in (413, 400)
  else:
    head, _, body = response.partition('\r\n\r\n')
    assert head.startswith(f'HTTP/1.1 {status} '), response
    assert json.loads(body)['error']['code'] == code
  assert served.status('/healthz') == 200


def test_too_many_connections(served):
  address = '127.0.0.1', served.port
  held = [socket.create_connection(address) for _ in range(40)]
  try:
    assert held[-1].recv(1000).startswith(b'HTTP/1.1 503 ')
  finally:
    for connection in held:
      connection.close()


def test_a_client_that_does_not_read_is_cut_off(served):
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.connect(('127.0.0.1', served.port))
    connection.setblocking(False)
    rest = (GET + b'\r\n') * 5000
    reset = select.poll()
    reset.register(connection, select.POLLOUT)
    end = time.monotonic() + 20
    while not (found := reset.poll(1000)) or found[0][1] == select.POLLOUT:
      assert time.monotonic() < end, 'still connected'
      if found:
        rest = rest[connection.send(rest):]
        if not rest:
          reset.modify(connection, 0)  # only the end is waited for


def test_clients_that_leave_hold_nothing(served, files):
  body = json.dumps(asked(files)).encode()
  head = POST + b'Content-Length: %d\r\n\r\n'
  for cut in (10, len(body)):
    for _ in range(5):
      with socket.create_connection(('127.0.0.1', served.port)) as connection:
        connection.sendall(head % len(body) + body[:cut])
  end = time.monotonic() + 20
  while 'xmodal_requests_in_flight 0.0' not in httpx.get(f'{served.address}/metrics').text:
    assert time.monotonic() < end
    time.sleep(0.02)


def test_a_request_that_runs_is_answered_before_the_process_ends(run, files):
  served = Served(run, '--sizes', '2').wait_until_ready()
  body = {'task': 'generation', 'text': 'a', 'stream': True, 'options': {'steps': 60}}
  with httpx.stream('POST', f'{served.address}/v1/predict', json=body, timeout=120) as response:
    lines = response.iter_lines()
    assert next(lines) == 'event: step'
    served.process.send_signal(signal.SIGTERM)
    assert 'event: answer' in list(lines)
  assert served.process.wait(60) == 0
  with pytest.raises(OSError):
    socket.create_connection(('127.0.0.1', served.port)).close()


def test_a_signal_while_it_compiles_ends_it(run):
  served = Served(run)
  assert served.status('/healthz') == 200 and served.status('/readyz') == 503
  served.process.send_signal(signal.SIGINT)
  _, err = served.process.communicate(timeout=120)
  assert (served.process.returncode, err) == (0, '')


def failing(*arguments, **options):
  done = subprocess.run([sys.executable, '-m', 'xmodal', 'serve', *map(str, arguments)], cwd=ROOT,
                        capture_output=True, text=True, timeout=120, **options)
  assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
  return done.stderr


def test_a_bad_start_is_one_line(tmp_path, served):
  assert 'no' in failing('--checkpoint', tmp_path / 'nothing', '--port', '0')
  line = failing('--checkpoint', tmp_path, '--port', served.port)
  assert f'--port {served.port}: Address already in use' in line
  assert '--sizes=0' in failing('--checkpoint', tmp_path, '--sizes', '0')
  assert '--waiting=0' in failing('--checkpoint', tmp_path, '--waiting', '0')
  for key in ('', ' ', 'key\n'):
    assert '--api_key' in failing('--checkpoint', tmp_path, '--api_key', key)
  assert 'XMODAL_API_KEY' in failing('--checkpoint', tmp_path,
                                     env={**os.environ, 'XMODAL_API_KEY': ''})


@pytest.mark.parametrize('flags, warns', [
    (['--host', '0.0.0.0'], True), (['--host', '0.0.0.0', '--api_key', 'a'], False),
    (['--host', '127.0.0.1'], False)])
def test_a_server_that_all_may_use_says_so(flags, warns, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('uvicorn.Server.run', lambda self, sockets: sockets[0].close())
  monkeypatch.setattr('signal.signal', lambda *_: None)
  monkeypatch.delenv('XMODAL_API_KEY', raising=False)
  engine = mock.Mock(tasks={'vqa': None})
  assert main(['--checkpoint', str(tmp_path), '--port', '0', *flags], lambda *_: engine) == 0
  assert ('without --api_key' in capsys.readouterr().err) == warns


def test_without_fastapi_it_says_what_to_install(tmp_path):
  done = subprocess.run(
      [sys.executable, '-c', 'import sys\nsys.modules["fastapi"] = None\n'
       'from xmodal.serve.__main__ import main\nsys.exit(main(["--checkpoint", "a"]))'],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == "error: fastapi is not installed: pip install 'xmodal[serve]'\n"
