"""Milliseconds of attention forward and backward, for each kernel.

`xmodal bench attention [--rounds 5]` times softmax attention and its gradients by
queries, keys, values and bias in bfloat16 on one GPU, at the shapes of the `large` models:

  xla         jax.numpy, the fallback
  cudnn mask  cuDNN's flash attention, padding as a mask
  cudnn       the same, padding as the number of valid keys of each row where a mask is only that

A number is the median over rounds of 20 calls. TFLOP/s count two products forward, four backward.
"""

import argparse
import functools
import statistics
import sys
import time

from xmodal.bench.harness import check_positive, run_command
from xmodal.errors import UserError

# name: batch, queries, keys, heads, head_dim, has padding, has bias, is causal
SHAPES = {
    'ViT, 224 pixels': (128, 196, 196, 16, 64, False, False, False),
    'ViT, 512 pixels': (32, 1024, 1024, 16, 64, False, False, False),
    'T5 encoder, 32 words': (128, 32, 32, 16, 64, True, True, False),
    'T5 encoder, 256 words': (32, 256, 256, 16, 64, True, True, False),
    'words to image': (128, 32, 196, 16, 64, False, False, False),
    'image to words': (128, 196, 32, 16, 64, True, False, False),
}


def _arrays(shape):
  import jax
  import jax.numpy as jnp
  batch, queries, keys, heads, width, padding, bias, _ = shape
  rng = jax.random.split(jax.random.key(0), 6)
  make = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  q, k, v = (make(r, (batch, n, heads, width)) for r, n in zip(rng, (queries, keys, keys)))
  lengths = jax.random.randint(rng[3], (batch,), keys // 2, keys + 1) if padding else None
  return (q, k, v, make(rng[4], (1, heads, queries, keys)) if bias else None), lengths, make(
      rng[5], q.shape)


def _ways():
  import jax
  import jax.numpy as jnp

  from xmodal.models.attention import attention

  def masked(implementation, q, k, v, bias, lengths):
    mask = None if lengths is None else (
        jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, :]
    return attention(q, k, v, bias=bias, mask=mask, implementation=implementation)

  def counted(q, k, v, bias, lengths):
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, key_value_seq_lengths=lengths, implementation='cudnn')

  return {'xla': functools.partial(masked, 'xla'),
          'cudnn mask': functools.partial(masked, 'cudnn'), 'cudnn': counted}


def _timed(way, arrays, lengths, weight, rounds):
  import jax
  import jax.numpy as jnp

  def loss(arrays):
    return jnp.sum((way(*arrays, lengths) * weight).astype(jnp.float32))

  step = jax.jit(jax.grad(loss))
  jax.block_until_ready(step(arrays))
  found = []
  for _ in range(rounds):
    began = time.perf_counter()
    for _ in range(20):
      result = step(arrays)
    jax.block_until_ready(result)
    found.append((time.perf_counter() - began) / 20)
  return statistics.median(found), result


def _run(options):
  import jax
  import numpy as np
  check_positive(options, 'rounds')
  if jax.default_backend() != 'gpu':
    raise UserError(f'the kernels are those of an NVIDIA GPU; the device is a '
                    f'{jax.default_backend()}')
  print(jax.devices()[0].device_kind)
  ways = _ways()
  print(f'{"ms (TFLOP/s)":24}', *(f'{name:>16}' for name in ways))
  for name, shape in SHAPES.items():
    batch, queries, keys, heads, width, *_ = shape
    arrays, lengths, weight = _arrays(shape)
    flops, cells, exact = 6 * 2 * batch * queries * keys * heads * width, [], None
    for way in ways.values():
      try:
        seconds, result = _timed(way, arrays, lengths, weight, options.rounds)
      except Exception as error:  # pylint: disable=broad-except  # a kernel may refuse a shape
        cells.append(f'{type(error).__name__:>16}')
        print(f'  {name}: {str(error)[:200]}', file=sys.stderr)
        continue
      cells.append(f'{seconds * 1e3:8.3f} ({flops / seconds / 1e12:5.1f})')
      values = [np.asarray(x, np.float32) for x in jax.tree.leaves(result)]
      exact = exact or values
      for x, y in zip(values, exact):
        if np.linalg.norm(x - y) > 0.03 * np.linalg.norm(y):
          cells[-1] += '!'
    print(f'{name:24}', *cells, flush=True)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench attention', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=5)
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
