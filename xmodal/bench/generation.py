"""Speed of image generation: training examples and generated pictures per second.

`xmodal bench generation [--size tiny] [--batch 32] [--pixels 32] [--steps 20]
[--sampler heun] [--guidance 3] [--attention xla] [--rounds 5] [--threads N]` trains on one batch of
embedded scenes and draws one batch, in alternating rounds, and prints medians. FLOPs are those of
the denoiser's matrix products by formula: a multiply-add is two, a training step is three forward
passes, and the text tower is left out. 'of peak' is their share of the FLOPs that this machine
reaches in one large matrix product of the same dtype, measured here.
"""

import argparse
import statistics
import sys
import tempfile
import time

import numpy as np

from xmodal import config as configs
from xmodal.bench.harness import check_positive, limit_threads, run_command
from xmodal.bench.multitask_cost import Step
from xmodal.models import parts
from xmodal.models.attention import IMPLEMENTATIONS


def forward_flops(denoiser, text_length: int) -> int:
  """FLOPs of one forward pass for one picture, without time embedding and text projection.

  Args:
    denoiser: a models.denoiser.Denoiser.
    text_length: number of text tokens.
  """
  d, (height, width) = denoiser, denoiser.image_size
  patches = height * width // d.patch_size ** 2
  n, dim, length = patches + d.context_tokens, d.hidden_dim, text_length
  self_attention = 4 * n * dim ** 2 + 2 * n ** 2 * dim
  cross_attention = 2 * n * dim ** 2 + 2 * length * dim ** 2 + 2 * n * length * dim
  layer = self_attention + cross_attention + 3 * n * dim * d.mlp_dim + 6 * dim ** 2
  pixels = (4 if d.patches == 'overlap' else 1) * 3 * d.patch_size ** 2
  ends = patches * (d.bottleneck_dim * (pixels + dim) + dim * pixels) + 2 * dim ** 2
  return 2 * (d.num_layers * layer + ends)


def looks(sampler: str, steps: int, guidance: float) -> int:
  """Forward passes per generated picture."""
  return (steps if sampler == 'euler' else 2 * steps - 1) * (1 if guidance == 1 else 2)


def peak_flops(dtype) -> float:
  """FLOPs per second of one large matrix product, the best of five."""
  import jax
  # On an accelerator, dispatch would take longer than a small product.
  side = 2048 if jax.default_backend() == 'cpu' else 8192
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
  multiply = jax.jit(lambda x: x @ x)
  multiply(x).block_until_ready()
  seconds = []
  for _ in range(5):
    began = time.perf_counter()
    multiply(x).block_until_ready()
    seconds.append(time.perf_counter() - began)
  return 2 * side ** 3 / min(seconds)


def make_config(options):
  """The config for the options of a command line."""
  c = configs.base()
  c.mixer.tasks = ('generation',)
  c.data.drawn = True
  c.data.train_examples = c.data.eval_examples = options.batch
  c.data.image_size = options.pixels
  c.model.size, c.train.batch_size = options.size, options.batch
  c.generation.caption_length = 14
  c.generation.sampler, c.generation.steps = options.sampler, options.steps
  c.generation.guidance = options.guidance
  c.model.attention = options.attention
  return c


def measure(config, rounds: int) -> dict[str, dict[str, float]]:
  """{'train', 'draw': {'seconds' per batch, 'examples', 'flops' per second, 'peak' share}}."""
  import jax

  from xmodal.sharding import mesh as meshes
  from xmodal.train import build
  from xmodal.train.plan import Plan
  from xmodal.train.steps import state as states

  with tempfile.TemporaryDirectory() as folder:
    run = Plan(config, folder)
    step = Step(run, run.sampling.kinds[0])
    size = config.train.batch_size
    batch = meshes.put_batch(run.maker('train')(np.arange(size), np.arange(size)), run.mesh, size)
    task = run.tasks['generation'].with_sampling()
    model = build.make_model(run.config, run.tokenizer, {'generation': task})
    draw = jax.jit(lambda variables, batch: model.apply(variables, batch, method='predict'))
    variables = states.create(run.init, run.abstract).variables
    ways = {'train': lambda: step()[0],
            'draw': lambda: draw(variables, batch)['generation']['image']}
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
      for name, way in ways.items():
        began = time.perf_counter()
        jax.block_until_ready(way())
        if number:  # the first round compiles
          seconds[name].append(time.perf_counter() - began)
  own = config.generation
  once = forward_flops(model.heads['generation'].denoiser, own.caption_length)
  flops = {'train': 3 * once, 'draw': once * looks(own.sampler, own.steps, own.guidance)}
  peak = peak_flops(build.compute_dtype(config)) * jax.device_count()
  found = {}
  for name, of_rounds in seconds.items():
    median = statistics.median(of_rounds)
    of_second = flops[name] * size / median
    found[name] = {'seconds': median, 'examples': size / median, 'flops': of_second,
                   'peak': of_second / peak}
  return found


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='tiny', help=', '.join(parts.SIZES))
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--pixels', type=int, default=32)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--sampler', default='heun')
  parser.add_argument('--guidance', type=float, default=3.0)
  parser.add_argument('--attention', default='xla', help=', '.join(IMPLEMENTATIONS))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, help='processors; default: all')
  return run_command(_run, parser.parse_args(arguments))


def _run(options):
  check_positive(options, 'batch', 'steps', 'rounds')
  if options.threads is not None:
    limit_threads(options.threads)
  import jax
  print(f'{options.size}, {options.pixels} pixels, batch {options.batch}; drawn in {options.steps} '
        f'{options.sampler} steps, guidance {options.guidance:g}; {jax.device_count()} x '
        f'{jax.devices()[0].device_kind}')
  print(f'{"":>6} {"s/batch":>9} {"examples/s":>11} {"GFLOP/s":>9} {"of peak":>8}')
  for name, row in measure(make_config(options), options.rounds).items():
    print(f'{name:>6} {row["seconds"]:9.4f} {row["examples"]:11.2f} {row["flops"] / 1e9:9.1f} '
          f'{row["peak"]:8.1%}')


if __name__ == '__main__':
  sys.exit(main())
