"""Milliseconds from a question to the classifier's scores, in a loaded model: ours and PyTorch.

`xmodal bench latency [--size base] [--batch 1] [KEY=VALUE ...]` computes the answer
scores of random pictures and questions with the model of `xmodal bench train_step`, with equal
weights, in alternating rounds: ours compiled, and PyTorch without gradients. It stops if their
losses differ by more than 0.1% in float32.
"""

import argparse
import sys

import numpy as np

from xmodal.bench import train_step
from xmodal.bench.harness import (
  check_positive,
  chosen_ways,
  limit_threads,
  measure,
  num_threads,
  run_command,
  share_gpu,
)

WAYS = ('ours', 'eager')


def _ours(step: train_step.Ours):
  """A function that returns (the loss of the batch,), still on the device."""
  import jax

  variables, batch = step.state.variables, step.batch

  def loss(variables, batch):
    outputs = step.model.apply(variables, batch, deterministic=True)
    return step.task.losses(outputs['vqa'], batch['vqa'])['cls'].mean()

  compiled = jax.jit(loss).lower(variables, batch).compile()
  return lambda: (compiled(variables, batch),)


def _torch(model, batch):
  import torch
  device = next(model.parameters()).device
  features = {key: torch.tensor(value).to(device)
              for key, value in {'image': batch['image'], **batch['vqa']}.items()}
  for key in ('question', 'answer'):
    features[key] = features[key].long()
  model.eval()

  def run():
    with torch.inference_mode():
      return (model(features),)
  return run


def _run(options):
  share_gpu()
  limit_threads(options.threads)
  check_positive(options, 'batch', 'rounds')
  names = chosen_ways(options.ways, WAYS)
  config = train_step.make_config(options.size, options.batch, options.changes)
  config.vqa.generation_weight = 0.0  # the classifier alone
  batch = train_step.make_batch(config)
  step = train_step.Ours(config, batch)
  ways = {}
  if 'eager' in names:
    model = train_step.make_reference(config)
    step.copy_parameters(model)
    ways['eager'] = _torch(model, batch)
  ways['ours'] = _ours(step)
  print(f'{step.num_parameters / 1e6:.1f}M parameters, batch {options.batch}, {num_threads()} '
        'processors')
  found = {name: float(way()[0]) for name, way in ways.items()}
  if len(found) > 1:
    np.testing.assert_allclose(found['ours'], found['eager'], rtol=1e-3)
  train_step.print_table(measure(ways, options.rounds, 1), options.batch)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench latency', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='base', help='45m, or a value of config.model.size')
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--threads', type=int, help='processors for both; default: all')
  parser.add_argument('--ways', default=','.join(WAYS), help='what to measure, comma-separated')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
