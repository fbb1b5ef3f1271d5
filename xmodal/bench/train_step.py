"""Seconds per training step: ours against the same model in PyTorch.

`xmodal bench train_step [--size 45m] [--batch 16] [--threads N] [KEY=VALUE ...]`
trains on one random batch of pictures, questions and answers, from the same
parameters, in alternating rounds:
  ours     train.steps.step.make_train_step, compiled with the state donated
  eager    the same architecture from transformers' modules, fused AdamW
  compile  the same under torch.compile
It stops if a parameter of one has no counterpart in the other, or if losses or
gradient norms of the first two steps differ by more than 0.1% in float32.
Without torch it measures only ours. float32 on a CPU, bfloat16 with float32
parameters on a GPU, or model.dtype; both on the same device.
'ours/' is the median over rounds of the ratio within a round: below 1 ours is
faster.
"""

import argparse
import re
import statistics
import sys
import types

import numpy as np

from xmodal import config as configs
from xmodal.bench.harness import (
  changed,
  check_positive,
  chosen_ways,
  limit_threads,
  measure,
  num_threads,
  run_command,
  share_gpu,
  torch_device,
)
from xmodal.errors import UserError

WAYS = ('ours', 'eager', 'compile')
# ViT, T5 encoder and co-attention of equal width: 45 million parameters.
_45M = {'model.size': 'small', 'model.vision.num_layers': 6, 'model.text.num_layers': 6,
        'model.text.hidden_dim': 384}
_PAD, _EOS, _VOCAB, _ANSWERS = 0, 1, 8000, 3129
# Keys that may be changed; the benchmark does not use the rest of the config.
_USED = re.compile(
    r'seed|model\.(?!text\.(tokenizer|vocab_size)).*|mesh\..*|data\.image_size|'
    r'vqa\.(question_length|answer_length|generation_weight)|'
    r'optimizer\.(learning_rate|weight_decay|clip_norm|b1|b2|eps)')


def make_config(size: str, batch: int, changes=()):
  """A config for '45m' or a key of models.parts.SIZES; the vqa task with its classifier only.

  Args:
    size: model size.
    batch: examples per step.
    changes: 'key=value' each, for config keys that the step depends on.

  Raises:
    UserError: unknown key, value of another type, or a key without effect here.
  """
  config = configs.base()
  config.data.image_size = 224
  config.vqa.generation_weight = 0.0
  config.train.batch_size = batch
  of_size = _45M if size == '45m' else {'model.size': size}
  changed(config, [*(f'{key}={value}' for key, value in of_size.items()), *changes])
  for change in changes:
    if not _USED.fullmatch(change.partition('=')[0]):
      raise UserError(f'{change}: the benchmark does not apply it (one step of the vqa task '
                      'with its classifier, no accumulation, no average; --batch sets the batch '
                      'size); leave it out')
  return config


def make_batch(config) -> dict:
  """A random batch of the vqa task as numpy arrays, with texts of different lengths."""
  rng = np.random.default_rng(0)
  size, side = config.train.batch_size, config.data.image_size

  def texts(length):
    tokens = rng.integers(_EOS + 1, _VOCAB, (size, length), np.int32)
    ends = rng.integers(length // 2, length, (size, 1))
    places = np.arange(length)
    return np.where(places < ends, tokens, np.where(places == ends, _EOS, _PAD)).astype(np.int32)

  answers = rng.integers(0, _ANSWERS, (size, 1), np.int32)
  return {
      'image': rng.integers(0, 256, (size, side, side, 3), np.uint8),
      'valid': np.ones(size, bool),
      'vqa': {'question': texts(config.vqa.question_length), 'target_ids': answers,
              'target_scores': np.ones((size, 1), np.float32),
              'cls_weight': np.ones(size, np.float32),
              'answer': texts(config.vqa.answer_length),
              'gen_weight': np.ones(size, np.float32)}}


class Ours:
  """Our step; a call returns (loss, gradient norm), both still on the device."""

  def __init__(self, config, batch: dict):
    """Initialises the state; the first call compiles."""
    import jax
    import optax

    from xmodal.sharding import mesh as meshes
    from xmodal.tasks.vqa import VQA
    from xmodal.train import build
    from xmodal.train.optimizer.optimizer import make_optimizer
    from xmodal.train.steps import state as states
    from xmodal.train.steps.step import make_train_step

    tokenizer = types.SimpleNamespace(vocab_size=_VOCAB, pad_id=_PAD, eos_id=_EOS)
    self.task = task = VQA(tokenizer, [f'answer {i}' for i in range(_ANSWERS)],
               question_length=config.vqa.question_length, answer_length=config.vqa.answer_length,
               generation_weight=config.vqa.generation_weight,
               dropout_rate=config.model.dropout_rate)
    self.model = build.make_model(config, tokenizer, {'vqa': task})
    variables = states.variables_fn(self.model, batch, config.seed)
    optimizer = make_optimizer(
        config.optimizer, optax.constant_schedule(config.optimizer.learning_rate),
        jax.eval_shape(variables)['params'])
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    meshes.check_batch(mesh, config.train.batch_size)
    init = states.init_fn(variables, optimizer, config.seed, ema=False)
    abstract = states.abstract_state(init, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    self._step = jax.jit(
        make_train_step(self.model, {'vqa': task}, {'vqa': 1.0}, optimizer), donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(mesh)))
    self.batch = meshes.put_batch(batch, mesh, config.train.batch_size)
    self.state = states.create(init, abstract)

  @property
  def num_parameters(self) -> int:
    """Number of parameters of the whole model."""
    import jax
    return sum(x.size for x in jax.tree.leaves(self.state.params))

  def copy_parameters(self, reference) -> None:
    """Copies the parameters of a torch_reference.Reference."""
    import jax

    from xmodal.bench.torch_reference import parameters_for_ours
    params = parameters_for_ours(reference, self.model, self.state.params)
    # A copy: the step donates its state, and CPU arrays may share memory with torch.
    self.state = self.state.replace(params=jax.tree.map(
        lambda new, old: jax.device_put(np.array(new), old.sharding), params, self.state.params))

  def __call__(self):
    self.state, metrics = self._step(self.state, self.batch)
    return metrics['loss'], metrics['gradient_norm']


class Torch:
  """The reference's step, eager or compiled; a call returns (loss, gradient norm)."""

  def __init__(self, name: str, model, config, batch: dict):
    import torch

    from xmodal.bench.torch_reference import make_step
    device = next(model.parameters()).device
    features = {'image': batch['image'], **batch['vqa']}
    self._batch = {key: torch.tensor(value).to(device) for key, value in features.items()}
    for key in ('question', 'answer'):
      self._batch[key] = self._batch[key].long()
    self._step = make_step(model, config, compiled=name == 'compile')

  def __call__(self):
    return self._step(self._batch)


def make_ways(names, config, batch: dict) -> dict:
  """Makes the steps by name, ours first, all with the same initial parameters.

  Raises:
    UserError: the config cannot be trained by all ways.
  """
  models = {name: make_reference(config) for name in names if name != 'ours'}
  ways = {}
  if 'ours' in names:
    ways['ours'] = Ours(config, batch)
    for model in models.values():
      ways['ours'].copy_parameters(model)
  return ways | {name: Torch(name, model, config, batch) for name, model in models.items()}


def make_reference(config):
  """The torch_reference.Reference of a config, with random parameters, on JAX's device."""
  import torch

  from xmodal.bench.torch_reference import Reference
  device = _torch_device(config)
  torch.manual_seed(config.seed)
  torch.set_num_threads(num_threads())
  return Reference(config, _VOCAB, _ANSWERS, _PAD).train().to(device)


def _torch_device(config):
  """As `torch_device`; UserError if the config's mesh has several devices."""
  device = torch_device()
  for key, value in config.mesh.items():
    if value not in (-1, 1):
      raise UserError(f'mesh.{key}={value}: PyTorch is measured on one device; leave it out, or '
                      'measure only ours with --ways ours')
  return device


def first_steps(ways: dict) -> dict[str, list[tuple[float, float]]]:
  """(loss, gradient norm) of the first two steps of each way; also compiles."""
  return {name: [tuple(map(float, step())) for _ in range(2)] for name, step in ways.items()}


def _check_equal(first):
  expected, *others = first.values()
  for seen in others:
    np.testing.assert_allclose(seen, expected, rtol=1e-3)


def _print_first_steps(first):
  for i in range(2):
    print(f'step {i + 1}:', ', '.join(f'{name} loss {loss:.4f} gradient norm {norm:.4f}'
                                      for name, seen in first.items() for loss, norm in [seen[i]]))


def print_table(seconds: dict[str, list[float]], batch: int) -> None:
  """Prints seconds per step of each way, and the median over rounds of ours over another."""
  print(f'{"":>8} {"s/step":>9} {"fastest":>9} {"slowest":>9} {"examples/s":>11} {"ours/":>7}')
  for name, of_rounds in seconds.items():
    median = statistics.median(of_rounds)
    row = (f'{name:>8} {median:9.4f} {min(of_rounds):9.4f} {max(of_rounds):9.4f} '
           f'{batch / median:11.2f}')
    if 'ours' in seconds and name != 'ours':
      ratios = [ours / theirs for ours, theirs in zip(seconds['ours'], of_rounds)]
      row += f' {statistics.median(ratios):7.3f}'
    print(row, flush=True)


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='45m', help="45m, or a value of config.model.size")
  parser.add_argument('--batch', type=int, default=16, help='examples per step')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=1, help='steps per round (10 or more on a GPU)')
  parser.add_argument('--threads', type=int, help='processors for both; default: all')
  parser.add_argument('--ways', default=','.join(WAYS), help='what to measure, comma-separated')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  options = parser.parse_args(arguments)
  return run_command(_run, options)


def _run(options):
  from xmodal.train import build
  share_gpu()
  limit_threads(options.threads)
  check_positive(options, 'batch', 'rounds', 'steps')
  names = chosen_ways(options.ways, WAYS)
  config = make_config(options.size, options.batch, options.changes)
  ways = make_ways(names, config, make_batch(config))
  if 'ours' in ways:
    print(f'{ways["ours"].num_parameters / 1e6:.2f}M parameters each, batch {options.batch}, '
          f'{config.data.image_size} pixels, {num_threads()} processors')
  first = first_steps(ways)
  _print_first_steps(first)
  if build.compute_dtype(config) == np.float32:
    _check_equal(first)
  print_table(measure(ways, options.rounds, options.steps), options.batch)


if __name__ == '__main__':
  sys.exit(main())
