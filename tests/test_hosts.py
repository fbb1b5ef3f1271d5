"""Process 0 misses the signs of life of others."""

import threading
import types

import pytest

from xmodal.sharding import hosts


class Service:
  """The keys of JAX's coordination service, in this process."""

  def __init__(self):
    self._values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self._values and not allow_overwrite:
      raise RuntimeError('ALREADY_EXISTS')
    self._values[key] = value

  def key_value_try_get(self, key):
    return self._values[key]

  def key_value_dir_get(self, folder):
    return [(key, value) for key, value in self._values.items() if key.startswith(f'{folder}/')]


@pytest.mark.parametrize('beats', [False, True])
def test_a_process_that_falls_silent_at_once_or_later_ends_the_run(monkeypatch, capfd, beats):
  service, ended = Service(), threading.Event()

  def exit_now(code):
    assert code == hosts.EXIT_CODE
    ended.set()
    threading.Event().wait()  # as a process that ends, it does nothing more

  monkeypatch.setattr(hosts, '_BEAT', 0.05)
  monkeypatch.setattr(hosts, '_POLL_SECONDS', 0.05)
  monkeypatch.setattr(hosts, '_END_TIMEOUT', 0.1)
  monkeypatch.setattr(hosts, 'exit_now', exit_now)
  monkeypatch.setattr(hosts.Listener, 'lost', 0.5)
  monkeypatch.setattr(hosts, '_state', lambda: types.SimpleNamespace(
      client=service, process_id=0, num_processes=2))
  monkeypatch.setattr(hosts.atexit, 'register', lambda function: None)
  if beats:
    service.key_value_set('xmodal/alive/1', '1')
  hosts.Listener()
  assert ended.wait(60)
  assert capfd.readouterr().err.startswith('process 1 gave no sign of life for 0.5 s; run the same')
