"""Several processes, as on the hosts of a pod, train as one process with one device."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
import single
import tiny

from xmodal.data import order
from xmodal.data.scenes.shapes import Shapes
from xmodal.sharding import hosts
from xmodal.train.plan import Plan

ROOT = pathlib.Path(__file__).parents[1]


# Ctrl-C reaches only the second process, in the evaluation after its first step.
INTERRUPTED = '''
import os, signal, sys, time
from xmodal import main
from xmodal.sharding import hosts
from xmodal.train.process.stop import Stop

reached, places = Stop.reached, []

def interrupted(self):
  places.append(1)
  if len(places) == 2 and os.environ['SLURM_PROCID'] == '1':
    os.kill(os.getpid(), signal.SIGINT)
    while hosts.listener()._last is None:  # or the evaluation would have ended
      time.sleep(0.01)
  return reached(self)

Stop.reached = interrupted
sys.exit(main.main())
'''


# Predictions are exchanged in several pieces.
IN_PIECES = '''
import sys
from xmodal import main
from xmodal.train.process import together

together._AT_ONCE = 2000
sys.exit(main.main())
'''


def run_hosts(workdir, *changes, program=('-m', 'xmodal.main'), code=0):
  """Runs xmodal.main on two hosts of one device each; returns what they printed."""
  command = [sys.executable, *program, '--config', ROOT / 'tests' / 'tiny.py',
             '--workdir', workdir, *changes]
  # Environment that Slurm sets; JAX derives its port from the job's number.
  slurm = {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost',
           'SLURM_NTASKS': '2', 'SLURM_LOCALID': '0', 'JAX_NUM_CPU_DEVICES': '1'}
  processes = [
      subprocess.Popen(
          [*map(str, command), '--multihost'], cwd=ROOT, text=True, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT, env={**os.environ, **slurm, 'SLURM_PROCID': str(host)})
      for host in range(2)]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [code] * 2, '\n'.join(outputs)[-4000:]
  assert not any('starting' in out or 'resuming' in out for out in outputs[1:])  # only one prints
  return outputs


def final(workdir):
  return json.loads((workdir / 'final.json').read_text())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """The pictures and questions of the tiny run as files; each of two hosts reads one truncated
  picture in its half of the first batch or the second. Returns values for --config."""
  folder = tmp_path_factory.mktemp('data')
  for split, count in (('train', 64), ('val', 20)):
    source, lines = Shapes(split, size=count, image_size=32), []
    for i in range(count):
      example, name = source[i], f'{split}_{i}.png'
      Image.fromarray(example.image).save(folder / name)
      lines.append(json.dumps({
          'image': name, 'question': example.question, 'answers': example.answers,
          'objects': [{'name': o.name, 'box': o.box} for o in example.objects]}) + '\n')
    (folder / f'{split}.jsonl').write_text(''.join(lines))
  for batch, row in ((0, 1), (1, 6)):
    record = order.train_records(order.positions(batch, 8), 64, seed=0)[row]
    broken = folder / f'train_{record}.png'
    broken.write_bytes(broken.read_bytes()[:100])
  return {'data.source': 'jsonl', 'data.root': str(folder)}


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data):
  """By number of hosts: three steps, then three more; of two hosts first with the batch split, then
  with the layers, and interrupted in an evaluation that one host does not make."""
  one, two = (tmp_path_factory.mktemp(f'hosts{hosts}') / 'run' for hosts in (1, 2))
  c = single.changed(**data, mixer__tasks=('vqa',))
  first = c.copy_and_resolve_references()
  first.train.steps = 3
  found = {1: (one, tiny.train(one, first))}
  after_three = predictions(one)
  found[1] += tiny.train(one, c),
  changes = [f'--config.{key}={value}' for key, value in data.items()]
  changes += ["--config.mixer.tasks=('vqa',)", '--config.mixer.weights=(1.0,)']
  run_hosts(two, *changes, '--config.train.steps=3')
  found[2] = two, final(two)
  assert predictions(two) == after_three  # of hosts with their own examples
  changes += ['--config.mesh.tensor=2', '--config.train.eval_every=4']
  outputs = run_hosts(two, *changes, program=('-c', INTERRUPTED), code=75)
  assert 'stopped after step 4: saved' in outputs[0]
  assert evaluations(two) == [3]
  run_hosts(two, *changes, program=('-c', IN_PIECES))
  found[2] += final(two),
  return found


@pytest.mark.parametrize('lost, how', [
    (0, signal.SIGKILL), (1, signal.SIGKILL),
    (0, signal.SIGSTOP), (1, signal.SIGSTOP)])  # as of a machine that hangs
def test_the_other_ends_soon_after_one_was_lost(tmp_path, lost, how):
  with socket.create_server(('localhost', 0)) as s:
    coordinator = f'localhost:{s.getsockname()[1]}'
  processes = [subprocess.Popen(
      [*map(str, (sys.executable, '-m', 'xmodal.main', '--config', ROOT / 'tests' / 'tiny.py',
                  '--workdir', tmp_path / 'run', *single.ARGUMENTS, '--config.train.steps=100000',
                  '--config.train.log_every=1', '--coordinator', coordinator,
                  '--num_processes', 2, '--process_id', number, '--lost', 5))], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}) for number in range(2)]
  try:
    while not (line := processes[0].stdout.readline()).startswith('step 3'):
      assert line, 'ended early'
    processes[lost].send_signal(how)
    rest = processes[1 - lost].communicate(timeout=120)[0]
  finally:
    for process in processes:
      process.kill()
  assert processes[1 - lost].returncode == hosts.EXIT_CODE, rest[-2000:]
  assert 'run the same command again to resume' in rest.splitlines()[-1]


@pytest.mark.parametrize('processes, words', [
    ([(0, '--config.seed=0'), (1, '--config.seed=1')], 'config.seed is 1 for process 1 on'),
    ([(0, '--num_processes=3'), (1, '--num_processes=3')], '2 of 3 processes started within 20 s'),
    ([(0, '--num_processes=3'), (1, '--num_processes=3'), (1, '--num_processes=3')],
     'two processes are number 1, on'),
    ([(1, '--config.seed=0')], 'process 0 cannot be reached at localhost:'),
    ([(0, '--config.mesh.fsdp=3'), (1, '--config.mesh.fsdp=3')], 'do not multiply to the 2 dev'),
    ([(0, '--config.train.batch_size=9'), (1, '--config.train.batch_size=9')],
     'batch_size=9 does not divide')])
def test_processes_that_cannot_start_end_alike_in_one_line(tmp_path, processes, words):
  with socket.create_server(('localhost', 0)) as s:
    coordinator = f'localhost:{s.getsockname()[1]}'
  started = [subprocess.Popen(
      [*map(str, (sys.executable, '-m', 'xmodal.main', '--config', ROOT / 'tests' / 'tiny.py',
                  '--workdir', tmp_path / 'run', *single.ARGUMENTS, '--coordinator', coordinator,
                  '--num_processes=2', '--process_id', number, '--wait', 20, change))],
      cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}) for number, change in processes]
  try:
    said = [process.communicate(timeout=120)[1].splitlines() for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [2] * len(started), said
  lines = [[line for line in lines if line.startswith('error: ')] for lines in said]
  assert all(len(found) == 1 and words in found[0] for found in lines), said
  assert not any('Traceback' in line for lines in said for line in lines)
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def losses(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['loss'] for line in lines if line['split'] == 'train' and line['task'] == 'all']


def predictions(workdir):
  lines = map(json.loads, (workdir / 'predictions_vqa_val.jsonl').read_text().splitlines())
  return [(line['record'], line['question'], line['answer']) for line in lines]


def evaluations(workdir):
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [line['step'] for line in lines if line['split'] == 'eval' and line['task'] == 'vqa']


def test_two_hosts_train_as_one(runs):
  one, two = (losses(runs[hosts][0]) for hosts in (1, 2))
  assert len(one) == 6
  np.testing.assert_allclose(two, one, rtol=1e-4)
  assert runs[2][2]['resumed_from'] == 4
  assert evaluations(runs[2][0]) == [3, 4, 6]
  abstract = Plan(single.changed(mixer__tasks=('vqa',)), 'unused').abstract
  a, b = (tiny.restored(runs[hosts][0], abstract=abstract) for hosts in (1, 2))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
               a.params, b.params)


def test_two_hosts_count_every_example_once(runs):
  for part in (1, 2):  # hosts with their own examples, then hosts that share all
    one, two = (runs[hosts][part]['evaluation']['vqa'] for hosts in (1, 2))
    assert two['examples'] == one['examples'] == tiny.get_config().data.eval_examples
    assert two['accuracy'] == one['accuracy']
  assert predictions(runs[2][0]) == predictions(runs[1][0])


def test_all_pictures_that_cannot_be_read_are_reported(runs):
  for part in (1, 2):  # the second resumes, and read none itself
    one, two = (runs[hosts][part]['unreadable_pictures'] for hosts in (1, 2))
    assert len(two['train']) == 2 and two == one


def test_too_many_on_all_hosts_end_each_with_one_line(data, tmp_path):
  changes = [f'--config.{key}={value}' for key, value in data.items()]
  outputs = run_hosts(tmp_path / 'run', *single.ARGUMENTS, *changes,
                      '--config.data.max_bad_share=0.02', code=2)
  lines = [[line for line in out.splitlines() if line.startswith('error: ')] for out in outputs]
  assert lines[0] == lines[1] and len(lines[0]) == 1
  assert '2 of 64 pictures cannot be read' in lines[0][0]
  assert 'Traceback' not in ''.join(outputs)
