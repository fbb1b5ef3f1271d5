"""Pictures per second of DETR training and inference: ours against transformers in PyTorch.

`xmodal bench detection [--size r50] [--batch 2] [--pixels 320x416] [--compile]`
runs a DETR with random weights, of the size of the published detr-resnet-50, on
one random batch of pictures of two sizes, about 7 objects in each, in alternating
rounds:
  ours     Detr with the same weights, tasks.detection.losses, compiled with the state donated
  eager    transformers' DETR with its own loss, fused AdamW
  compile  the same under torch.compile
The losses differ by design: ours is a focal loss, matched on the device;
transformers' is a softmax with "no object", matched on the CPU. So the benchmark
compares logits and boxes instead, before timing, and stops if they differ by more
than 0.001 in float32. Both freeze the stem, the first stage and the backbone's
norms. Without torch, or with --ways ours, it measures only ours. float32 on a
CPU, bfloat16 with float32 parameters on a GPU, both on the same device. 'ours/' is
the median over rounds of the ratio of pictures/s within a round: above 1 ours is
faster. On a loaded machine use --threads 1: torch's threads synchronise at every
operation, and the ratio would favour ours.
"""

import argparse
import os
import re
import statistics
import sys

import numpy as np

from xmodal import config as configs
from xmodal.bench.harness import (
  check_positive,
  chosen_ways,
  limit_threads,
  measure,
  num_threads,
  run_command,
  share_gpu,
  torch_device,
)
from xmodal.bench.train_step import WAYS
from xmodal.errors import UserError

# Arguments of transformers' ResNetConfig and DetrConfig; the others keep the paper's values.
SIZES = {
    'r50': (dict(out_features=['stage4']), dict(num_labels=91)),
    'tiny': (dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic',
                  out_features=['stage2']),
             dict(num_labels=7, num_queries=20, d_model=16, encoder_layers=1, decoder_layers=1,
                  encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                  decoder_ffn_dim=24))}
_FROZEN = r'^resnet/(stem/|stage1_|.*_norm/)'  # as in torch_detection.make_model


def make_batch(size: int, pixels: tuple[int, int], num_names: int, num_places: int):
  """A random batch: every second picture has three quarters of the height and width.

  Args:
    size: B, number of pictures.
    pixels: H, W of the batch.
    num_names: number of classes.
    num_places: M, the maximum number of objects per picture; the mean is about 7, as in COCO.

  Returns:
    images float32 [B, H, W, 3], mask bool [B, H, W], boxes float32 [B, M, 4] and
    names int32 [B, M]; see torch_detection.to_torch.
  """
  rng = np.random.default_rng(0)
  mask = np.ones((size, *pixels), bool)
  mask[1::2, pixels[0] * 3 // 4:] = mask[1::2, :, pixels[1] * 3 // 4:] = False
  images = rng.normal(size=(*mask.shape, 3)) * mask[..., None]
  first, last = np.sort(rng.uniform(size=(2, size, num_places, 2)), axis=0)
  counts = np.clip(rng.poisson(7, (size, 1)), 1, num_places)
  names = np.where(np.arange(num_places) < counts, rng.integers(num_names, size=(size, num_places)),
                   -1)
  return (images.astype(np.float32), mask, np.concatenate([first, last], -1, dtype=np.float32),
          names.astype(np.int32))


class Ours:
  """Our module; compiles at the first calls."""

  def __init__(self, module, variables, config, batch):
    """Copies the variables; config: config.optimizer; batch: see make_batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from xmodal.train.optimizer.optimizer import make_optimizer
    from xmodal.train.steps.frozen import frozen_names, split
    # A copy: the step donates trained parameters, and CPU arrays may share memory with torch.
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), variables['params'])
    trained, self._fixed = split(params, frozen_names(_FROZEN, params))
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate), params)
    self._module = module
    self._statistics = jax.device_put(variables['batch_stats'])
    self._batch = jax.device_put(batch)
    self._state = trained, optimizer.init(trained), jax.random.key(0)
    self._train = jax.jit(self._make_train_step(optimizer), donate_argnums=0)
    self._infer = jax.jit(self._apply)

  @property
  def num_parameters(self) -> tuple[int, int]:
    """(all parameters, trained parameters)."""
    import jax
    trained, fixed = (sum(x.size for x in jax.tree.leaves(tree))
                      for tree in (self._state[0], self._fixed))
    return trained + fixed, trained

  def _apply(self, trained, fixed, statistics, images, mask, **options):
    from xmodal.train.steps.frozen import join
    return self._module.apply({'params': join(trained, fixed), 'batch_stats': statistics},
                              images, mask, **options)

  def _make_train_step(self, optimizer):
    import jax
    import optax

    def train_step(state, fixed, statistics, images, mask, boxes, names):
      trained, opt_state, rng = state
      rng, dropout = jax.random.split(rng)

      def objective(trained):
        found = self._apply(trained, fixed, statistics, images, mask, deterministic=False,
                            rngs={'dropout': dropout})
        return _loss(*found, boxes, names)

      loss, grads = jax.value_and_grad(objective)(trained)
      updates, opt_state = optimizer.update(grads, opt_state, trained)
      return ((optax.apply_updates(trained, updates), opt_state, rng),
              (loss, optax.tree.norm(grads)))

    return train_step

  def train(self):
    """Takes a training step; returns (loss, gradient norm), still on the device."""
    self._state, result = self._train(self._state, self._fixed, self._statistics, *self._batch)
    return result

  def infer(self):
    """Float32 logits [B, Q, C + 1] and boxes [B, Q, 4], still on the device."""
    return self._infer(self._state[0], self._fixed, self._statistics, *self._batch[:2])


def _loss(logits, places, boxes, names):
  """The set prediction loss, a mean over all objects of the batch, without a "no object" class."""
  from xmodal.models.detector.boxes import to_corners
  from xmodal.tasks.detection.losses import LOSS_WEIGHTS, Queries, set_losses
  terms = set_losses(Queries(logits[..., :-1], to_corners(places)), boxes, names)
  count = (names >= 0).sum(-1)  # at least one per picture
  return sum(weight * (terms[term] * count).sum() / count.sum()
             for term, weight in LOSS_WEIGHTS.items())


class Torch:
  """transformers' model, eager or compiled; interface as Ours."""

  def __init__(self, model, config, batch, *, half: bool, compiled: bool):
    from xmodal.bench import torch_detection
    self._batch = torch_detection.to_torch(*batch, model.device)
    options = dict(half=half, compiled=compiled)
    # First, because it copies the model, which training steps change.
    self._infer = torch_detection.make_infer(model, **options)
    self._train = torch_detection.make_train_step(model, config, **options)

  def train(self):
    """See Ours."""
    return self._train(*self._batch)

  def infer(self):
    """See Ours."""
    return self._infer(*self._batch[:2])


def make_ways(names, size: str, config, batch) -> dict:
  """Makes the ways by name, all with the same weights.

  Args:
    names: some of train_step.WAYS.
    size: a key of SIZES.
    config: a run's config, of which model.dtype and optimizer are used.
    batch: see make_batch.
  """
  from xmodal.train import build
  dtype = build.compute_dtype(config)
  if tuple(names) == ('ours',):
    return {'ours': Ours(*_random(size, dtype), config.optimizer, batch)}
  import torch
  from transformers.utils import logging

  from xmodal.bench import torch_detection
  logging.disable_progress_bar()
  device = torch_device()
  torch.set_num_threads(num_threads())
  ways = {}
  for name in names:
    model = torch_detection.make_model(*SIZES[size])
    if name == 'ours':
      module, variables = torch_detection.in_jax(model)
      ways[name] = Ours(module.clone(dtype=dtype), variables, config.optimizer, batch)
    else:
      ways[name] = Torch(model.to(device), config.optimizer, batch, half=dtype != np.float32,
                         compiled=name == 'compile')
  return ways


def _random(size, dtype):
  """Our module of a size, and its randomly initialised variables; without torch."""
  import jax
  from transformers import DetrConfig, ResNetConfig

  from xmodal.pretrained import detr
  backbone, config = SIZES[size]
  config = DetrConfig(backbone_config=ResNetConfig(**backbone), **config)
  module = detr.module_from_config(config.to_dict(), {}).clone(dtype=dtype)
  return module, jax.jit(module.init)(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))


def largest_difference(ways: dict) -> float:
  """Largest difference of logits and boxes from the first way's; compiles inference."""
  expected, *others = ([np.array(x.tolist()) for x in way.infer()] for way in ways.values())
  return max((np.abs(a - b).max() for found in others for a, b in zip(found, expected)),
             default=0.0)


def _print_table(work, seconds, batch):
  print(f'{work:>8} {"pictures/s":>11} {"ours/":>7} {"lowest":>7} {"highest":>7}')
  for name, of_rounds in seconds.items():
    row = f'{name:>8} {batch / statistics.median(of_rounds):11.2f}'
    if 'ours' in seconds and name != 'ours':
      ratios = [theirs / ours for ours, theirs in zip(seconds['ours'], of_rounds)]
      row += f' {statistics.median(ratios):7.3f} {min(ratios):7.3f} {max(ratios):7.3f}'
    print(row, flush=True)


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='r50', help=', '.join(SIZES))
  parser.add_argument('--batch', type=int, help='pictures per step; 2 on a CPU, else 16')
  parser.add_argument('--pixels', metavar='HxW', help='320x416 on a CPU, else 800x1056')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=1, help='steps per round (10 or more on a GPU)')
  parser.add_argument('--threads', type=int, help='processors for both; default: all')
  parser.add_argument('--ways', default='ours,eager', help=f'some of {",".join(WAYS)}')
  parser.add_argument('--compile', action='store_true', help='also measure torch.compile')
  options = parser.parse_args(arguments)
  return run_command(_run, options)


def _read_pixels(text):
  match = re.fullmatch(r'(\d+)x(\d+)', text)
  if not match or min(pixels := tuple(map(int, match.groups()))) < 32:
    raise UserError(f'--pixels={text}: wanted HEIGHTxWIDTH of 32 or more each, such as 320x416')
  return pixels


def _run(options):
  share_gpu()
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  if options.size not in SIZES:
    raise UserError(f'--size={options.size}: wanted one of {", ".join(SIZES)}')
  limit_threads(options.threads)
  import jax

  from xmodal.train import build
  on_cpu = jax.default_backend() == 'cpu'
  if options.batch is None:
    options.batch = 2 if on_cpu else 16
  check_positive(options, 'batch', 'rounds', 'steps')
  pixels = _read_pixels(options.pixels or ('320x416' if on_cpu else '800x1056'))
  names = chosen_ways(options.ways + ',compile' * options.compile, WAYS)
  config = configs.base()
  config.optimizer.learning_rate = 1e-4  # as in the paper
  sizes = SIZES[options.size][1]
  batch = make_batch(options.batch, pixels, sizes['num_labels'],
                     min(sizes.get('num_queries', 100), config.detection.max_objects))
  ways = make_ways(names, options.size, config, batch)
  dtype = build.compute_dtype(config)
  print(f'DETR {options.size}, batch {options.batch} of {pixels[0]}x{pixels[1]} pixels, {dtype}, '
        f'{options.rounds} rounds; {jax.devices()[0].device_kind}, {num_threads()} processors')
  if 'ours' in ways:
    print('{:,} parameters, {:,} of them trained'.format(*ways['ours'].num_parameters))
  if len(ways) > 1:
    difference = largest_difference(ways)
    print(f'largest difference of logits and boxes: {difference:.1e}')
    if dtype == np.float32:
      assert difference < 1e-3
  for work in ('train', 'infer'):
    steps = {name: getattr(way, work) for name, way in ways.items()}
    measure(steps, 1, 2)  # compiles
    _print_table(work, measure(steps, options.rounds, options.steps), options.batch)


if __name__ == '__main__':
  sys.exit(main())
