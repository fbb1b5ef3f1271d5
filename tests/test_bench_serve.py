"""The benchmarks of the server, for a moment each."""

import re

import pytest
from served import make_run

from xmodal.bench import serve, soak


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('bench') / 'run', ('vqa',))


def test_rows_of_the_bare_loop_and_of_clients(run, capsys):
  assert serve.main(['--checkpoint', run, '--clients', '1', '3', '--seconds', '0.3', '--sizes',
                     '2', '4']) == 0
  head, _, *rows = capsys.readouterr().out.splitlines()
  assert head.startswith('vqa, ') and 'start to ready' in head
  names = [re.split(r'\s{2,}', row)[0] for row in rows]
  assert names == ['bare loop, batch 2', 'with pictures, batch 2', 'bare loop, batch 4',
                   'with pictures, batch 4', 'batches, 1 clients', 'batches, 3 clients',
                   'one by one, 1 clients', 'one by one, 3 clients']
  assert all(float(row.split()[-2]) > 0 for row in rows)


def test_a_short_soak_finds_no_fault(run, capsys):
  soak.main(['--checkpoint', run, '--minutes', '0.1', '--clients', '4', '--sizes', '2'])
  out = capsys.readouterr().out
  assert 'fault' not in out and 'exit code 0' in out and re.search(r'\d+ hostile', out)


def test_an_unknown_task_is_one_line(run, capsys):
  assert serve.main(['--checkpoint', run, '--task', 'no']) == 2
  assert capsys.readouterr().err.startswith('error: --task no: wanted one of vqa, ')
