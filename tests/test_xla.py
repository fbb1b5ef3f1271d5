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
'''


def test_sums_of_many_rows_are_right():
  environment = {key: value for key, value in os.environ.items()
                 if key not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')}
  done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True,
                        env={**environment, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-2000:]


SUMS, WAIT = ('--xla_cpu_experimental_ynn_fusion_type=',
              '--xla_cpu_collective_call_terminate_timeout_seconds=600')


@pytest.mark.parametrize('version, flags, wanted', [
    ('0.10.2', '', f'{SUMS} {WAIT}'), ('0.11.1', '--a=1', f'--a=1 {SUMS} {WAIT}'),
    ('0.10.2', f'{SUMS}-reduce', f'{SUMS}-reduce {WAIT}'), ('0.12.0', '--a=1', f'--a=1 {WAIT}'),
    ('0.12.0', WAIT.replace('600', '5'), WAIT.replace('600', '5')), ('0.13.0', '--a=1', '--a=1')])
def test_versions_get_the_flags_that_they_know(monkeypatch, version, flags, wanted):
  monkeypatch.setattr(xla.metadata, 'version', lambda name: version)
  environment = {'XLA_FLAGS': flags}
  xla.set_flags(environment)
  assert environment['XLA_FLAGS'] == wanted
