"""Processes that start one run find each other, or end with one line each."""

import concurrent.futures
import json
import socket
import time

import pytest

from xmodal.errors import UserError
from xmodal.sharding import roll_call


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def call(address, *processes, wait=10):
  """What each process (count, number, facts) was told: '' if it may start."""
  def one(process):
    try:
      roll_call.meet(address, *process, wait)
      return ''
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(one, processes))


def test_all_start_together(address):
  assert call(address, *((4, number, {'a': '1'}) for number in (3, 1, 0, 2))) == [''] * 4


def test_one_process_needs_no_other(address):
  assert call(address, (1, 0, {})) == ['']


def test_missing_processes_are_named_to_those_that_are_there(address):
  found = call(address, (4, 0, {}), (4, 2, {}), wait=1)
  assert found == ['2 of 4 processes started within 1 s; missing: 1, 3; start all of them, or wait '
                   'longer with --wait'] * 2


@pytest.mark.parametrize('other, words', [
    ((2, 1, {'config.seed': '1'}), 'config.seed is 1 for process 1'),
    ((2, 1, {}), 'config.seed is missing for process 1'),
    ((3, 1, {'config.seed': '0'}), 'one of 3 processes, process 0 as one of 2'),
    ((2, 0, {'config.seed': '0'}), None)])
def test_processes_that_do_not_belong_together(address, other, words):
  found = call(address, (2, 0, {'config.seed': '0'}), other, wait=1)
  if words is None:  # two coordinators: one has the port, and misses the other
    assert any('cannot be used' in line for line in found), found
  else:
    assert len(set(found)) == 1 and words in found[0]


def test_two_of_one_number(address):
  found = call(address, (3, 0, {}), (3, 1, {}), (3, 1, {}), wait=5)
  assert all(line.startswith('two processes are number 1, on ') for line in found), found


def test_nobody_answers(address):
  began = time.monotonic()
  (line,) = call(address, (2, 1, {}), wait=1)
  assert 'process 0 cannot be reached at 127.0.0.1' in line and 'within 1 s' in line
  assert time.monotonic() - began < 5


def test_strangers_are_not_counted(address):
  def stranger():
    for _ in range(50):
      try:
        with socket.create_connection(roll_call.parse(address), timeout=1) as link:
          link.sendall(b'GET / HTTP/1.1\r\n\r\n')
          return
      except OSError:
        time.sleep(0.05)

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(stranger)
    time.sleep(0.1)
    assert call(address, (2, 0, {}), (2, 1, {})) == ['', '']


def connect(address):
  for _ in range(100):
    try:
      return socket.create_connection(roll_call.parse(address), timeout=5)
    except OSError:
      time.sleep(0.05)
  raise AssertionError('nobody listens')


def test_silent_strangers_keep_nobody_waiting(address):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(call, address, (2, 0, {}), wait=4)
    strangers = [connect(address) for _ in range(3)]
    assert call(address, (2, 1, {}), wait=4) == first.result() == ['']
    for stranger in strangers:
      stranger.close()


def test_a_process_that_left_and_came_again_counts_once(address):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(call, address, (3, 0, {}))
    with connect(address) as left:
      left.sendall(json.dumps({'count': 3, 'number': 1, 'host': 'a', 'facts': {}}).encode() + b'\n')
    assert call(address, (3, 1, {}), (3, 2, {})) == ['', '']
    assert first.result() == ['']


@pytest.mark.parametrize('address', ['node1', 'node1:', ':80', 'node1:70000', 'node1:x'])
def test_addresses_that_are_none(address):
  with pytest.raises(UserError, match='wanted HOST:PORT'):
    roll_call.parse(address)
