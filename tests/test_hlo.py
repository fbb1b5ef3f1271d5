"""Costs read from compiled programs, against what programs of known cost must move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmodal.cost import estimate, hlo, machines


def compiled(function, *arguments):
  return hlo.cost(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_kernel_reads_its_operands_and_writes_its_result():
  x = np.ones((256, 256), np.float32)
  found = compiled(lambda x, y: jnp.tanh(x) + y, x, x)
  assert found.other_bytes == 3 * x.nbytes
  assert found.product_bytes == 0 and not found.collectives


def test_loops_count_as_often_as_they_run_and_slices_alone_are_read():
  layers = np.ones((50, 64, 64), np.float32)
  x = np.ones((64, 64), np.float32)

  def body(x, layer):
    return jnp.tanh(x + layer), None

  found = compiled(lambda x, layers: jax.lax.scan(body, x, layers)[0], x, layers)
  # Each turn reads the state and one layer, and writes the state; some compilers also copy it.
  once = 3 * x.nbytes
  assert 50 * once <= found.other_bytes <= 51 * once + 52 * 2 * x.nbytes


def test_matrix_products_are_told_from_other_kernels():
  x = np.ones((512, 512), np.float32)
  found = compiled(lambda x: x @ x, x)
  assert 2 * x.nbytes <= found.product_bytes <= 3 * x.nbytes
  assert found.other_bytes <= x.nbytes


@pytest.mark.parametrize('text, group', [
    ('replica_groups={{0,1},{2,3}}, use_global', (0, 1)),
    ('replica_groups=[2,4]<=[8], use', (0, 1, 2, 3)),
    ('replica_groups=[4,2]<=[2,4]T(1,0), use', (0, 4)),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, use", (0, 4)),
    ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp','tensor'}", (0, 1, 2, 3)),
    ('channel_id=1', ())])
def test_groups_of_a_collective(text, group):
  assert hlo._group(text) == group


@pytest.mark.parametrize('kind, type_text, size', [
    ('all-reduce-start', '(f32[10]{0}, f32[2]{0})', 48),
    ('all-reduce-start', '((bf16[10]{0}), bf16[10]{0})', 20),
    ('all-gather-start', '((bf16[2]{0}, f32[2]{0}), (bf16[16]{0}, f32[16]{0}))', 96),
    ('all-gather-start', '(f32[2,3]{1,0}, f32[16,3]{1,0})', 192),
    ('reduce-scatter', 'f32[4]{0}', 16)])
def test_bytes_of_a_collective(kind, type_text, size):
  text = f'ENTRY %main (p: f32[2]) -> f32[2] {{\n  %x = {type_text} {kind}(%p), channel_id=1\n}}'
  (found,) = hlo.cost(text).collectives
  assert found.bytes == size


def test_collectives_take_as_long_as_published_links_say():
  h100 = machines.MACHINES['h100']
  one = hlo.Collective('all-reduce', 9e9, 2, tuple(range(8)), False)
  # A ring sends 2 (n - 1) / n of the array: 450 GB/s in each direction.
  assert estimate.seconds(h100, one, 8) == pytest.approx(2 * 9e9 * 2 * 7 / 8 / 450e9)
  # Over two hosts, the 8 network adapters of each carry it together.
  wide = hlo.Collective('all-reduce', 9e9, 1, tuple(range(16)), False)
  assert estimate.seconds(h100, wide, 8) == pytest.approx(9e9 * 2 * 15 / 16 / (50e9 * 8))
