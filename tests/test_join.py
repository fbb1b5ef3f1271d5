"""How a process finds its run, and which GPUs of its machine it takes."""

import os

import pytest

from xmodal.errors import UserError
from xmodal.train.process import join


@pytest.mark.parametrize('local, environment, wanted', [
    (None, {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}, None),  # by hand: what it sees
    (0, {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
         'SLURM_NODEID': '1'}, None),  # one task a machine: all
    (2, {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_TASKS_PER_NODE': '4(x2)',
         'SLURM_NODEID': '1'}, [2]),
    (3, {'CUDA_VISIBLE_DEVICES': '3', 'SLURM_STEP_TASKS_PER_NODE': '4', 'SLURM_NODEID': '0'}, None),
    (1, {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}, [2, 3]),
    (1, {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_STEP_TASKS_PER_NODE': '4(x2),2',
         'SLURM_NODEID': '2'}, [2, 3]),
    (1, {'CUDA_VISIBLE_DEVICES': '', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}, None),
    (0, {'JAX_LOCAL_DEVICE_IDS': '5,6', 'CUDA_VISIBLE_DEVICES': '0'}, [5, 6])])
def test_all_gpus_of_a_machine_are_used(local, environment, wanted):
  assert join.local_devices(local, environment) == wanted


def test_gpus_that_do_not_divide():
  with pytest.raises(UserError, match='4 GPUs do not divide among 3 processes'):
    join.local_devices(0, {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'OMPI_COMM_WORLD_LOCAL_SIZE': '3'})


@pytest.fixture
def bare(monkeypatch):
  for name in list(os.environ):
    if name.startswith(('JAX_COORD', 'JAX_NUM_PROC', 'JAX_PROC', 'SLURM', 'OMPI', 'PMI')):
      monkeypatch.delenv(name)
  return monkeypatch


@pytest.mark.parametrize('variables', [
    {'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'},
    {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3'},
    {'PMI_SIZE': '4', 'PMI_RANK': '3'}])
def test_variables_of_launchers(bare, variables):
  for name, value in variables.items():
    bare.setenv(name, value)
  assert join._by_hand('node1:8476', None, None)[:3] == ('node1:8476', 4, 3)


@pytest.mark.parametrize('arguments, words', [
    (('', 2, None), 'need --coordinator'), (('node1:8476', 2, None), 'needs --process_id'),
    (('node1:8476', None, 0), 'needs --num_processes'), (('node1', 2, 1), 'wanted HOST:PORT'),
    (('node1:8476', 2, 2), 'from 0 to one less')])
def test_half_a_place_is_refused(bare, arguments, words):
  with pytest.raises(UserError, match=words):
    join._by_hand(*arguments)


def test_no_cluster(bare):
  with pytest.raises(UserError, match='no cluster is recognised'):
    join._of_cluster(1)
