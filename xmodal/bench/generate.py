"""Tokens per second of generated text: ours against transformers' `generate`.

`xmodal bench generate [--size small] [--batches 1 32] [--beams 1 4] [--threads N]`
makes a T5 with random weights, of the size of t5-small or t5-base, which both read
from the files that transformers writes. Each generates --tokens tokens for the
same random prompts, greedily (1 beam) or by beam search, in alternating rounds.
There is no end token, so both take the same number of steps. Without torch, or
with --ways ours, it measures only ours. float32 on a CPU, bfloat16 on a GPU.
'ours/' is the median over rounds of the ratio of tokens/s within a round: above
1 ours is faster. 'equal' is the share of tokens on which both agree; texts of a
random model diverge from the first near tie that rounding decides.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile

import numpy as np

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
from xmodal.errors import UserError

WAYS = ('ours', 'transformers')
SIZES = {
    'tiny': dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=100),
    'small': dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128),
    'base': dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128),
}


class Ours:
  """Our generation: a call returns tokens int32 [B, T]; compiles at the first call."""

  def __init__(self, module, variables):
    import jax
    on_gpu = jax.default_backend() == 'gpu'
    self.module = module.clone(dtype='bfloat16' if on_gpu else 'float32',
                               scan_unroll=module.num_layers)
    self._variables = jax.device_put(variables)
    self._generate = jax.jit(self._write, static_argnums=(2, 3))

  @property
  def num_parameters(self) -> int:
    """Number of parameters of the whole model."""
    import jax
    return sum(x.size for x in jax.tree.leaves(self._variables))

  def _write(self, variables, tokens, length, beams):
    import jax.numpy as jnp

    from xmodal.models.generate import beam_search, greedy
    from xmodal.models.towers.t5 import start_writing
    mask = jnp.ones(tokens.shape, bool)
    encoded = self.module.apply(variables, tokens, mask, method='encode')
    step_fn, cache = start_writing(self.module, variables, encoded, mask, length, beams)
    options = dict(start_token=jnp.zeros(len(tokens)), eos_token=-1, pad_token=0,
                   max_length=length)
    if beams == 1:
      return greedy(step_fn, cache, **options)[0]
    return beam_search(step_fn, cache, **options)[0][:, 0]

  def __call__(self, tokens, length, beams):
    return np.asarray(self._generate(self._variables, tokens, length, beams))


class Transformers:
  """transformers' `generate`: a call returns tokens [B, T]."""

  def __init__(self, model):
    import torch
    self._device = torch_device()
    torch.set_num_threads(num_threads())
    self._model = model.eval().to(
        self._device, torch.bfloat16 if self._device == 'cuda' else torch.float32)
    self._model.generation_config.eos_token_id = None

  def __call__(self, tokens, length, beams):
    import torch
    tokens = torch.tensor(tokens).to(self._device)
    return self._model.generate(
        inputs=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length,
        do_sample=False, num_beams=beams)[:, 1:].cpu().numpy()


def make_ways(names, size: str) -> dict:
  """Makes both by name, with the same weights; ours alone is randomly initialised."""
  from transformers import T5Config
  config = T5Config(**SIZES[size], decoder_start_token_id=0, feed_forward_proj='relu',
                    architectures=['T5ForConditionalGeneration'])
  if 'transformers' not in names:
    import jax

    from xmodal.pretrained import t5
    module = t5.module_from_config(config.to_dict(), {})
    tokens = np.ones((1, 1), np.int32)
    return {'ours': Ours(module, jax.jit(lambda: module.init(
        jax.random.key(0), tokens, tokens > 0, tokens))())}
  import torch
  from transformers import T5ForConditionalGeneration
  from transformers.utils import logging

  from xmodal import pretrained
  logging.disable_progress_bar()
  torch.manual_seed(0)
  model = T5ForConditionalGeneration(config)
  ways = {'transformers': Transformers(model)}
  if 'ours' in names:
    with tempfile.TemporaryDirectory() as folder:
      model.save_pretrained(folder)
      ways = {'ours': Ours(*pretrained.load(folder)), **ways}
  return ways


def _row(ways, prompts, length, beams, rounds):
  """One row of the table; also compiles, and compares the texts."""
  texts = [way(prompts, length, beams) for way in ways.values()]
  seconds = measure({name: functools.partial(way, prompts, length, beams)
                     for name, way in ways.items()}, rounds, 1)
  row = f'{len(prompts):>6} {beams:>6}' + ''.join(
      f' {prompts.shape[0] * length / statistics.median(of_rounds):13.1f}'
      for of_rounds in seconds.values())
  if len(ways) == 2:
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    row += (f' {statistics.median(ratios):7.2f} {min(ratios):7.2f} {max(ratios):7.2f} '
            f'{np.mean(texts[0] == texts[1]):7.3f}')
  return row


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='small', help=', '.join(SIZES))
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 32], metavar='B')
  parser.add_argument('--beams', type=int, nargs='+', default=[1, 4], metavar='W')
  parser.add_argument('--tokens', type=int, default=32, help='tokens to generate for each prompt')
  parser.add_argument('--prompt', type=int, default=32, help='tokens per prompt')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, help='processors for both; default: all')
  parser.add_argument('--ways', default=','.join(WAYS), help='what to measure, comma-separated')
  options = parser.parse_args(arguments)
  return run_command(_run, options)


def _run(options):
  share_gpu()
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  if options.size not in SIZES:
    raise UserError(f'--size={options.size}: wanted one of {", ".join(SIZES)}')
  check_positive(options, 'batches', 'beams', 'tokens', 'prompt', 'rounds')
  names = chosen_ways(options.ways, WAYS)
  limit_threads(options.threads)
  import jax
  ways = make_ways(names, options.size)
  print(f'T5 {options.size}, prompts of {options.prompt} tokens, {options.tokens} generated, '
        f'{options.rounds} rounds; {jax.devices()[0].device_kind} on {platform.machine()}, '
        f'{num_threads()} processors')
  print(f'{"batch":>6} {"beams":>6}' + ''.join(f' {name:>13}' for name in ways)
        + (f' {"ours/":>7} {"lowest":>7} {"highest":>7} {"equal":>7}' if len(ways) == 2 else '')
        + '   (tokens/s)')
  for batch in options.batches:
    prompts = np.random.default_rng(0).integers(
        2, SIZES[options.size]['vocab_size'], (batch, options.prompt), np.int32)
    for beams in options.beams:
      print(_row(ways, prompts, options.tokens, beams, options.rounds), flush=True)


if __name__ == '__main__':
  sys.exit(main())
