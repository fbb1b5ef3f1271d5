"""Data at hf:// addresses, of an emulated hub, are those of a folder."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse

from huggingface_hub import constants
import published
import pytest
from test_pipeline import CHANGES, Boxes, assert_equal, maker
from test_remote_data import _SETS, assert_same

from xmodal import storage
from xmodal.data import check, pipeline
from xmodal.data.sources.source import SOURCES

ROOT = 'hf://datasets/owner/name'
_API, _FILES = '/api/datasets/owner/name', '/datasets/owner/name/resolve/main/'


class _Hub(http.server.BaseHTTPRequestHandler):
  """Answers for one data set, the files of a folder."""

  folder: pathlib.Path
  status = 200

  def log_message(self, *_):
    pass

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    path = urllib.parse.unquote(url.path)
    if self.status != 200:
      self._send(self.status, {'error': 'refused'})
    elif path in (_API, f'{_API}/revision/main'):
      self._send(200, {'id': 'owner/name', 'sha': '0' * 40, 'siblings': []})
    elif path.startswith(f'{_API}/tree/main'):
      below = self.folder / path.removeprefix(f'{_API}/tree/main').strip('/')
      found = below.rglob('*') if 'recursive=true' in url.query.lower() else below.glob('*')
      if below.is_dir():
        self._send(200, list(map(self._entry, found)))
      else:
        self._send(404, {}, 'EntryNotFound')
    elif path.startswith(_FILES) and (file := self.folder / path.removeprefix(_FILES)).is_file():
      self._send_file(file.read_bytes())
    else:
      self._send(404, {}, 'EntryNotFound' if 'owner/name' in path else 'RepoNotFound')

  def _entry(self, path):
    return {'type': 'directory' if path.is_dir() else 'file', 'oid': '0' * 40,
            'path': str(path.relative_to(self.folder)), 'size': path.stat().st_size}

  def _send_file(self, data):
    first, _, last = self.headers.get('Range', 'bytes=0-').removeprefix('bytes=').partition('-')
    self.send_response(206)
    self._finish(data[int(first):int(last) + 1 if last else None])

  def _send(self, status, content, error=''):
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('X-Error-Code', error)
    self._finish(json.dumps(content).encode())

  def _finish(self, body):
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """The emulated hub; its folder is tmp_path / 'name'."""
  handler = type('Hub', (_Hub,), {'folder': tmp_path / 'name'})
  with contextlib.ExitStack() as closing:
    server = closing.enter_context(http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    closing.callback(server.shutdown)
    address = f'http://127.0.0.1:{server.server_port}'
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, 'ENDPOINT', address)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    storage._file_system_of.cache_clear()
    yield handler
  storage._file_system_of.cache_clear()


@pytest.mark.parametrize('name', ['jsonl', 'parquet', 'webdataset', 'imagefolder', 'coco'])
def test_examples_and_batches_are_those_of_a_folder(hub, tmp_path, name):
  files, split = _SETS[name]
  folder = published.write(hub.folder, files)
  found, local = (SOURCES[name].make(root, split) for root in (ROOT, folder))
  assert_same(found, local, ROOT, folder)
  batches = [pipeline.train_batches(maker(source, Boxes(), CHANGES, share=1.0, root=root), 4, 0, 3)
             for source, root in ((found, ROOT), (local, folder))]
  for a, b in zip(*batches, strict=True):
    assert_equal(a, b)


def test_a_data_set_that_is_not_there_or_is_refused_is_one_line(hub, tmp_path, capsys):
  published.write(hub.folder, _SETS['jsonl'][0])
  for status, address, line in ((200, 'hf://datasets/owner/other', 'is not there'),
                                (403, ROOT, 'no permission')):
    hub.status = status
    storage._file_system_of.cache_clear()
    assert check.main([address, '--split', 'train']) == 2
    error = capsys.readouterr().err
    assert line in error and error.count('\n') == 1
