"""The page of xmodal serve in a headless Chromium, from a picture file to boxes on the screen.

SERVE_SCREENSHOTS=DIR writes screenshots there, SERVE_CHECKPOINT=DIR serves a trained run instead of
an untrained model. Tests of answers run on the run and on a bundle of it, whose server wants a key.
"""

import base64
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time

import numpy as np
from PIL import Image
import pytest
from served import Served, make_run
from test_serve import Echo
import uvicorn
from websockets.sync.client import connect  # the DevTools protocol

from xmodal import export
from xmodal.data.scenes.shapes import Shapes
from xmodal.serve.app import Server
from xmodal.serve.limits import Limits

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no chromium: apt-get install chromium')

TASKS = ('detection', 'vqa', 'captioning', 'retrieval', 'objects', 'generation')
KEY = 'a key'
_SECONDS = 120


class Browser:
  """One page of a headless Chromium, driven by the DevTools protocol.

  Attributes:
    served: name of what it shows, for screenshots.
    requested: addresses that the page asked for.
    errors: uncaught errors, and messages of the console about errors.
  """

  def __init__(self, folder):
    self._process = subprocess.Popen(
        [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
         '--no-first-run', '--disable-background-networking', '--disable-component-update',
         f'--user-data-dir={folder}', '--remote-debugging-port=0', 'about:blank'],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in self._process.stderr:
      if found := re.search(r'ws://127\.0\.0\.1:\d+/devtools/browser/\S+', line):
        break
    self._connection = connect(found[0], max_size=None, open_timeout=60)
    self._socket = self._connection.__enter__()
    self._number, self._session = 0, None
    self.served, self.requested, self.errors = '', [], []
    target = self._call('Target.createTarget', url='about:blank')['targetId']
    self._session = self._call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Network', 'Log', 'DOM'):
      self._call(f'{domain}.enable')

  def close(self):
    self._connection.__exit__(None, None, None)
    self._process.kill()
    self._process.wait()

  def _call(self, method, **params):
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    self._socket.send(json.dumps(message))
    while True:
      answer = json.loads(self._socket.recv(timeout=_SECONDS))
      if answer.get('id') == self._number:
        assert 'error' not in answer, (method, answer)
        return answer['result']
      self._note(answer['method'], answer['params'])

  def _note(self, method, params):
    if method == 'Network.requestWillBeSent':
      self.requested.append(params['request']['url'])
    elif method == 'Runtime.exceptionThrown':
      self.errors.append(params['exceptionDetails'])
    elif method == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(params['entry'])

  def go(self, address):
    self._call('Page.navigate', url=address)

  def run(self, code):
    """The value of an expression in the page."""
    found = self._call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def wait(self, code):
    """Waits until an expression is true; returns its value."""
    end = time.monotonic() + _SECONDS
    while not (value := self.run(code)):
      assert time.monotonic() < end, (code, self.run('document.body.innerText'), self.errors)
      time.sleep(0.05)
    return value

  def choose(self, *paths, field='file'):
    """Chooses files, as the dialog of the system does."""
    root = self._call('DOM.getDocument')['root']['nodeId']
    node = self._call('DOM.querySelector', nodeId=root, selector=f'#{field}')['nodeId']
    self._call('DOM.setFileInputFiles', nodeId=node, files=list(map(str, paths)))

  def drop(self, *paths):
    """Drops files or folders on the page."""
    data = {'items': [], 'files': list(map(str, paths)), 'dragOperationsMask': 1}
    for kind in ('dragEnter', 'dragOver', 'drop'):
      self._call('Input.dispatchDragEvent', type=kind, x=100, y=300, data=data)

  def press(self, key, text=''):
    code = {'Tab': 9, 'Enter': 13, 'ArrowRight': 39, 'ArrowLeft': 37}.get(key, 0)
    for kind in ('keyDown', 'keyUp'):
      down = {'text': text} if text and kind == 'keyDown' else {}
      self._call('Input.dispatchKeyEvent', type=kind, key=key, code=key,
                 windowsVirtualKeyCode=code, **down)

  def write(self, text):
    self._call('Input.insertText', text=text)

  def size(self, width, height, dark=False):
    self._call('Emulation.setDeviceMetricsOverride', width=width, height=height,
               deviceScaleFactor=1, mobile=width < 600)
    self._call('Emulation.setEmulatedMedia', features=[
        {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

  def screenshot(self, name):
    """Writes a picture of the whole page to $SERVE_SCREENSHOTS/{served}, if that is set."""
    if folder := os.environ.get('SERVE_SCREENSHOTS'):
      shot = self._call('Page.captureScreenshot', format='png', captureBeyondViewport=True)
      file = pathlib.Path(folder) / self.served / f'{name}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(base64.b64decode(shot['data']))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return os.environ.get('SERVE_CHECKPOINT') or make_run(
      tmp_path_factory.mktemp('page') / 'run', TASKS)


@pytest.fixture(scope='module')
def served_run(run):
  served = Served(run, '--sizes', '2')
  yield served.wait_until_ready()
  assert served.stop() == (0, '')


@pytest.fixture(scope='module')
def served_bundle(run, tmp_path_factory):
  bundle = tmp_path_factory.mktemp('page') / 'bundle'
  assert export.main(['--checkpoint', str(run), '--output', str(bundle), '--platforms', 'cpu',
                      '--sizes', '2']) == 0
  served = Served(bundle, XMODAL_API_KEY=KEY)
  yield served.wait_until_ready()
  assert served.stop() == (0, '')


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp('profile'))
  yield browser
  browser.close()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder, source = tmp_path_factory.mktemp('shown'), Shapes('val', size=3, image_size=96)
  for number in range(3):
    Image.fromarray(source[number].image).save(folder / f'{number}.png')
  return [folder / f'{number}.png' for number in range(3)]


both = pytest.mark.parametrize('page', ['run', 'bundle'], indirect=True)


@pytest.fixture
def page(request, browser):
  """The page, freshly opened and ready; checks afterwards that it asked no other host."""
  browser.served = getattr(request, 'param', 'run')
  served = request.getfixturevalue(f'served_{browser.served}')
  browser.requested.clear()
  browser.errors.clear()
  browser.size(1200, 900)
  browser.go(served.address)
  if browser.served == 'bundle':
    browser.wait('/enter it under Key/.test(document.querySelector("#status.wrong")?.textContent)')
    browser.errors.clear()  # the 401
    browser.run('document.querySelector("summary").click(); document.getElementById("key").focus()')
    browser.write(KEY)
    browser.press('Enter')
  browser.wait('document.body?.dataset.ready === "true"')
  yield browser
  assert browser.errors == []
  assert all(url.startswith((served.address, 'data:', 'blob:')) for url in browser.requested)


def use(page, task):
  page.run(f'document.querySelector("input[value={task}]").click()')


def needs(page, task):
  if not page.run(f'Boolean(document.querySelector("input[value={task}]"))'):
    pytest.skip(f'the served model has no {task}')


def ask(page, task, text, *paths):
  needs(page, task)
  use(page, task)
  if paths:
    page.choose(*paths)
    page.wait('!document.getElementById("canvas").hidden')
  page.run(f'document.getElementById("text").value = {json.dumps(text)}')
  page.wait('!document.getElementById("send").disabled')
  page.run('document.getElementById("send").click()')
  answered(page)


def answered(page):
  status = page.wait('(one => /^Answered/.test(one.textContent) || one.classList.contains("wrong")'
                     ' ? one.textContent : "")(document.getElementById("status"))')
  assert status.startswith('Answered'), status


def says(page, text):
  page.wait(f'document.getElementById("status").textContent.includes({json.dumps(text)})')


# Pixels of the canvas that differ from the picture by itself.
PAINTED = '''(() => {
  const canvas = document.getElementById("canvas"), plain = document.createElement("canvas");
  [plain.width, plain.height] = [canvas.width, canvas.height];
  plain.getContext("2d").drawImage(pictures[0].bitmap, 0, 0, canvas.width, canvas.height);
  const [a, b] = [canvas, plain].map(one => one.getContext("2d").getImageData(
    0, 0, canvas.width, canvas.height).data);
  return a.reduce((sum, value, place) => sum + (value !== b[place]), 0);
})()'''


PASTE = '''(bytes => {
  const clipboardData = new DataTransfer(), type = "image/png";
  clipboardData.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {bubbles: true, clipboardData}));
})'''


@both
def test_from_a_picture_file_to_boxes_on_the_screen(page, files):
  ask(page, 'detection', 'red circle. blue square. green cross.', files[0])
  page.screenshot('detection')
  boxes = functools.partial(page.run, 'Number(document.body.dataset.boxes)')
  slide = ('(value => { const slider = document.getElementById("threshold"); slider.value = value;'
           ' slider.dispatchEvent(new Event("input")); })')
  page.run(f'{slide}(0)')
  number, painted = boxes(), page.run(PAINTED)
  assert number > 0 and painted > 0
  assert page.run('document.querySelectorAll("#answer li").length') == number
  asked = len(page.requested)
  page.run(f'{slide}(1)')  # above all scores
  assert boxes() == 0 and page.run(PAINTED) == 0
  assert len(page.requested) == asked  # without the server


@both
def test_a_question_has_its_answers_as_bars(page, files):
  ask(page, 'vqa', 'what color is the square?', files[0])
  shares = page.run('[...document.querySelectorAll("meter")].map(one => one.value)')
  assert len(shares) == 5 and shares == sorted(shares, reverse=True)
  page.screenshot('vqa')


@both
def test_objects_are_bars(page, files):
  ask(page, 'objects', '', files[0])
  shares = page.run('[...document.querySelectorAll("#answer meter")].map(one => one.value)')
  assert 1 < len(shares) <= 10 and shares == sorted(shares, reverse=True)
  page.screenshot('objects')


@both
def test_a_caption(page, files):
  ask(page, 'captioning', '', files[0])
  assert page.run('document.getElementById("asks").hidden')  # it reads no text
  assert 'Probability' in page.run('document.getElementById("answer").textContent')


@both
def test_pictures_are_ranked_for_a_text_and_other_tasks_take_the_first(page, files):
  ask(page, 'retrieval', 'a red circle.', *files)
  shown = page.run('[...document.querySelectorAll("#pictures li")].map(one => one.innerText)')
  scores = [float(text.split()[0]) for text in shown]
  assert len(scores) == 3 and scores == sorted(scores, reverse=True)
  page.screenshot('retrieval')
  ask(page, 'vqa', 'what color is the square?')
  assert page.run('document.getElementById("pictures").hidden')
  use(page, 'retrieval')
  assert not page.run('document.getElementById("pictures").hidden')


@pytest.mark.parametrize('how', ['dropped', 'chosen'])
def test_a_folder_is_ranked(page, files, tmp_path, how):
  needs(page, 'retrieval')
  inner = tmp_path / 'photos' / 'of 1999'
  inner.mkdir(parents=True)
  for number in range(34):
    (inner.parent if number % 2 else inner).joinpath(f'{number:02}.png').write_bytes(
        files[0].read_bytes())
  (inner / 'list.txt').write_text('no picture')
  (inner / 'drawing.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
  use(page, 'retrieval')
  if how == 'dropped':
    page.drop(tmp_path / 'photos')
  else:
    page.choose(tmp_path / 'photos', field='folder')
  says(page, '32 pictures chosen, 2 left out: retrieval takes up to 32.')
  ask(page, 'retrieval', 'a red circle.')
  names = page.run('[...document.querySelectorAll("#pictures li img")].map(one => one.alt)')
  assert sorted(names) == [f'{number:02}.png' for number in range(32)]


def test_photographs_are_made_small_enough_for_one_request(page, tmp_path):
  needs(page, 'retrieval')
  noise = np.random.default_rng(0).integers(0, 256, (1000, 1100, 3), np.uint8)
  for number in range(6):  # of 3.3 MB each
    Image.fromarray(noise).save(tmp_path / f'{number}.png', compress_level=0)
  ask(page, 'retrieval', 'a red circle.', *sorted(tmp_path.iterdir()))
  assert page.run('[pictures[0].bitmap.width, pictures[0].bitmap.height]') == [1024, 931]


def test_a_picture_is_dropped_or_pasted(page, files):
  page.drop(files[0])
  says(page, '0.png chosen.')
  page.run(f'{PASTE}({json.dumps(list(files[1].read_bytes()))})')
  says(page, 'pasted.png chosen.')
  ask(page, 'vqa', 'what color is the square?')


def test_stop_ends_an_answer(page):
  needs(page, 'generation')
  use(page, 'generation')
  page.run('document.getElementById("text").value = "a red circle"')
  page.run('document.getElementById("send").click(), document.getElementById("stop").click()')
  says(page, 'Stopped.')
  assert page.run('document.getElementById("stop").hidden')
  ask(page, 'generation', 'a red circle')


def test_another_task_forgets_the_answer(page, files):
  ask(page, 'detection', 'red circle.', files[0])
  use(page, 'captioning')
  assert page.run('document.getElementById("answer").textContent') == ''
  assert page.run('document.getElementById("slider").hidden')
  assert page.run(PAINTED) == 0


@both
def test_a_drawing_is_shown(page):
  ask(page, 'generation', 'a red circle')
  if page.served == 'run':  # a bundle has no steps
    assert page.run('Number(document.body.dataset.previews)') >= 2
  assert page.run('document.querySelector("#answer img").naturalWidth') > 0


def test_the_keyboard_alone_asks_a_question(page, files):
  needs(page, 'vqa')
  use(page, 'vqa')
  page.choose(files[0])
  page.wait('!document.getElementById("send").disabled')
  page.run('document.activeElement.blur()')
  focused, outlined = [], 0
  for _ in range(8):
    page.press('Tab')
    focused.append(page.run('document.activeElement.id || document.activeElement.value'))
    outlined += page.run(
        '[document.activeElement, document.activeElement.nextElementSibling,'
        ' document.activeElement.parentElement].some('
        'one => one && getComputedStyle(one).outlineStyle !== "none")')
    if focused[-1] == 'text':
      break
  assert 'file' in focused and 'vqa' in focused and focused[-1] == 'text', focused
  assert outlined >= len(focused) - 1  # the skip link is shown instead
  page.write('how many circles?')
  page.press('Enter')
  answered(page)
  assert page.run('document.getElementById("status").getAttribute("aria-live")') == 'polite'


def test_everything_to_fill_in_has_a_label(page):
  unlabelled = page.run('[...document.querySelectorAll("input, textarea, button")].filter('
                        'one => !(one.labels?.length || one.textContent)).map(one => one.id)')
  assert unlabelled == []


@pytest.mark.parametrize('dark', [False, True])
def test_it_fits_a_phone(page, files, dark):
  page.size(360, 740, dark)
  ask(page, 'vqa', 'what color is the square?', files[0])
  page.screenshot(f'phone_{"dark" if dark else "light"}')
  assert page.run('document.documentElement.scrollWidth') <= 360
  back = page.run('getComputedStyle(document.body).backgroundColor')
  assert (sum(map(int, re.findall(r'\d+', back)[:3])) < 200) == dark


def test_a_mistake_is_told_in_words(page, tmp_path):
  (tmp_path / 'a.png').write_bytes(b'no picture')
  page.choose(tmp_path / 'a.png')
  says(page, 'cannot be opened')


def test_a_model_that_cannot_be_compiled_is_told(browser):
  def fail():
    raise RuntimeError('no memory')

  engine = Echo()
  engine.programs = lambda: [fail]
  with socket.create_server(('127.0.0.1', 0)) as bound:
    server = uvicorn.Server(uvicorn.Config(Server(engine, Limits()).app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [bound]})
    thread.start()
    browser.go(f'http://127.0.0.1:{bound.getsockname()[1]}/')
    browser.wait('document.getElementById("status")?.classList.contains("wrong")')
    assert browser.run('document.getElementById("status").textContent') == (
        'RuntimeError while compiling; see the log of the server')
    browser.go('about:blank')
    server.should_exit = True
    thread.join()
