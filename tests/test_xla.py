"""XLA's results on a CPU are right."""

import os
import subprocess
import sys

import pytest

from xmodal import xla

# More rows than 32,768, after which jaxlib 0.10 dropped the last columns of sums.
PROGRAM = '''
import xmodal
import jax, jax.numpy as jnp, numpy as np
x = np.stack([np.arange(40_000.), np.zeros(40_000), np.zeros(40_000)], axis=1).astype(np.float32)
found = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
np.testing.assert_allclose(found, np.arange(40_000.) ** 2, rtol=1e-5)
u = np.ones((3, 1, 2, 2, 8, 8, 8), np.float32)
assert jax.jit(lambda a: jnp.sum(a * a, axis=3))(u).shape == (3, 1, 2, 8, 8, 8)
# With jaxlib 0.12 two convolutions in 16 bits gave NaN.
from xmodal.models.towers.vgg import VGG
pictures = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
vgg = VGG((2,), (64,))
variables = vgg.init(jax.random.key(0), pictures)
wanted = jax.jit(vgg.apply)(variables, pictures)
found = jax.jit(vgg.clone(dtype=jnp.bfloat16).apply)(variables, pictures)
np.testing.assert_allclose(np.float32(found), wanted, atol=0.02 * float(jnp.abs(wanted).max()))
'''


def test_sums_of_many_rows_and_convolutions_in_16_bits_are_right():
  environment = {key: value for key, value in os.environ.items()
                 if key not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')}
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True,
                        env={**environment, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('version, flags, wanted', [
    ('0.10.2', '', '--xla_cpu_experimental_ynn_fusion_type='),
    ('0.11.1', '--a=1', '--a=1 --xla_cpu_experimental_ynn_fusion_type='),
    ('0.10.2', '--xla_cpu_experimental_ynn_fusion_type=-reduce',
     '--xla_cpu_experimental_ynn_fusion_type=-reduce'),
    ('0.12.0.1', '', '--xla_cpu_experimental_ynn_fusion_type='),
    ('0.13.0', '--a=1', '--a=1')])
def test_only_versions_with_the_fault_are_changed(monkeypatch, version, flags, wanted):
  monkeypatch.setattr(xla.metadata, 'version', lambda name: version)
  environment = {'XLA_FLAGS': flags}
  xla.avoid_wrong_sums(environment)
  assert environment['XLA_FLAGS'] == wanted
