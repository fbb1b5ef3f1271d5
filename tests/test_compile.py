"""Compiling for machines that are not attached, and choosing a mesh."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
import tiny

from xmodal import compile as compiling
from xmodal import main, suggest
from xmodal.cost import machines, scaling, topology
from xmodal.cost.flops import Flops
from xmodal.errors import UserError
from xmodal.train import programs


@pytest.mark.parametrize('name, words', [
    ('v9:2x2', "no machine 'v9'"), ('h10:8', 'h100'), ('h100:', 'wanted MACHINE:SHAPE'),
    ('h100:0', 'wanted MACHINE:SHAPE'), ('h100:1x2x3', 'wanted MACHINE:SHAPE'),
    ('v5e:16', 'wanted MACHINE:SHAPE'), ('v4:2x2', 'wanted MACHINE:SHAPE')])
def test_a_topology_of_no_machine_or_shape_is_refused(name, words):
  with pytest.raises(UserError, match=words):
    topology.devices_of(name)


def test_gpus_have_no_slices():
  with pytest.raises(UserError, match='--slices=2: GPUs have none'):
    topology.devices_of('h100:8', 2)


def test_a_missing_compiler_is_named(monkeypatch):
  def missing(**_):
    raise RuntimeError('topology not implemented for cuda')

  monkeypatch.setattr(topology.topologies, 'get_topology_desc', missing)
  with pytest.raises(UserError, match='the compiler of cuda is not installed.*jax-cuda13-plugin'):
    topology.devices_of('h100:8')


@pytest.fixture
def this_machine(monkeypatch):
  """Compiles for this machine's CPU, with the figures of a GPU."""
  monkeypatch.setattr(topology, 'devices_of', lambda name, slices: jax.devices())


def test_a_step_is_compiled_and_described(this_machine):
  found = next(compiling.compile_for(tiny.get_config(), 'h100:1'))
  text = compiling.report('h100:1', found)
  state = 12 * found.parameters  # float32 parameters and two moments
  assert found.bytes['parameters'] == 4 * found.parameters
  assert found.bytes['parameters'] + found.bytes['optimizer'] == pytest.approx(state, rel=0.01)
  assert sum(found.bytes.values()) == found.peak_bytes and min(found.bytes.values()) > 0
  assert 'step of vqa, objects, compiled in' in text
  assert found.flops.hardware >= found.flops.model > 6 * 8 * found.parameters
  assert '1 devices, mesh data 1 x fsdp 1 x tensor 1' in text and 'predicted step' in text
  compiling.check_fits('h100:1', found)


def test_each_kind_of_step_is_compiled(this_machine):
  c = tiny.changed(mixer__sampling='round_robin')
  steps = list(compiling.compile_for(c, 'h100:1'))
  assert [step.tasks for step in steps] == [('vqa',), ('objects',)]
  assert steps[0].flops.model != steps[1].flops.model


def test_a_step_that_does_not_fit_is_an_error(this_machine, monkeypatch):
  small = machines.Machine(1e12, 2**10, 1e12, 1e9, 1e9, per_host=8)
  monkeypatch.setitem(machines.MACHINES, 'h100', small)
  found = next(compiling.compile_for(tiny.get_config(), 'h100:1'))
  with pytest.raises(UserError, match=r'needs 0\.0 GB of memory on each device, which has 0\.0'):
    compiling.check_fits('h100:1', found)


def test_a_gpu_has_less_memory_for_arrays_than_its_datasheet_says(monkeypatch):
  monkeypatch.delenv(machines.FRACTION, raising=False)
  found = compiling.Compiled({'data': 1}, 1, Flops(1, 1), None, {}, 70 * 10**9, 1.0, None,
                             machines.MACHINES['h100'], 8)
  with pytest.raises(UserError, match=r'needs 70\.0 GB .* has 80\.0, of which JAX takes 60\.0'):
    compiling.check_fits('h100:1', found)
  monkeypatch.setenv(machines.FRACTION, '0.92')
  compiling.check_fits('h100:1', found)
  monkeypatch.setenv(machines.FRACTION, '92%')
  with pytest.raises(UserError, match='MEM_FRACTION=92%: wanted a number above 0, up to 1'):
    compiling.check_fits('h100:1', found)


def test_a_run_that_does_not_fit_ends_before_its_first_step(monkeypatch):
  def device(limit):
    stats = {'bytes_limit': limit} if limit else None  # CPUs have none
    return types.SimpleNamespace(memory_stats=lambda: stats)

  monkeypatch.setattr(jax, 'local_devices', lambda: [device(80 * 10**9), device(60 * 10**9)])
  programs.check_memory(60 * 10**9)
  with pytest.raises(UserError, match=r'needs 61\.0 GB of memory on each device, and JAX has 60'):
    programs.check_memory(61 * 10**9)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device(0)])
  programs.check_memory(61 * 10**9)


def test_what_a_scan_keeps_and_what_it_carries():
  def body(x, layer):
    x = jnp.tanh(x @ layer)
    return x, x.astype(jnp.bfloat16)

  jaxpr = jax.jit(lambda x, layers: jax.lax.scan(body, x, layers)).trace(
      jnp.ones((4, 8)), jnp.ones((3, 8, 8))).jaxpr
  assert scaling.kept(jaxpr) == (3 * 4 * 8 * 2, 3 * 4 * 8 * 4)


def load(**changes):
  return scaling.Load(**dict(
      flops=Flops(1e15, 1e15), parameters=10**9, state_bytes=12e9, kept_bytes=100e9,
      carried_bytes=1e9, rows=1024, heads=16) | changes)


def test_parameters_are_split_only_where_they_must():
  h100 = machines.MACHINES['h100']
  small = scaling.choose(h100, load(parameters=10**7, state_bytes=12e7), 8, 8)
  assert small.fits and (small.data, small.fsdp, small.tensor) == (8, 1, 1)
  # 20 billion parameters take 320 GB with gradients and moments.
  large = scaling.choose(h100, load(parameters=2 * 10**10, state_bytes=240e9), 64, 8)
  assert large.fits and large.fsdp * large.tensor >= 8
  assert large.memory <= h100.memory


def test_more_devices_than_examples_split_layers_or_are_refused():
  h100 = machines.MACHINES['h100']
  found = scaling.choose(h100, load(rows=4), 16, 8)
  assert found.data * found.fsdp <= 4 and found.tensor >= 4
  assert scaling.choose(h100, load(rows=3, heads=1), 16, 8) is None


def test_what_fits_nowhere_says_so():
  found = scaling.choose(machines.MACHINES['v5e'], load(state_bytes=1e12), 2, 256)
  assert not found.fits and found.fsdp * found.tensor == 2


def test_a_mesh_is_suggested_for_every_number_of_devices():
  lines = suggest.report(tiny.get_config(), 'v5e').splitlines()
  rows = [line.split() for line in lines if line.strip()[:1].isdigit() and 'M param' not in line]
  assert [int(row[0]) for row in rows] == list(suggest.DEVICES)
  assert rows[0][1:4] == ['1', '1', '1']
  assert all('does not divide' in ' '.join(row) for row in rows[-4:])  # 8 examples, 2 heads
  with pytest.raises(UserError, match="no machine of this name .did you mean 'v5"):
    suggest.report(tiny.get_config(), 'v5')


@pytest.mark.parametrize('arguments, words', [
    (['--mode=compile'], 'xmodal compile wants --topology'),
    (['--mode=plan'], 'xmodal plan wants --topology'),
    (['--topology=h100:8'], 'goes with xmodal compile and xmodal plan')])
def test_the_flag_and_the_commands_belong_together(arguments, words):
  run = subprocess.run([sys.executable, '-m', main.__name__, '--config', tiny.__file__, *arguments],
                       capture_output=True, text=True)
  assert run.returncode == 2 and words in run.stderr
