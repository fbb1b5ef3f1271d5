"""Differences of our models from PyTorch: xmodal bench parity [--published].

For each family, models with odd configurations and random weights are saved in
HuggingFace's layout and read with xmodal.pretrained; both sides run on the same
inputs in float32. Then ours is exported, and PyTorch reads it and runs again.
A difference is the largest absolute one over the largest absolute value.
--published adds a model of a published size to each family. Prints Markdown.
"""

import argparse
import dataclasses
import os
import sys
import tempfile

import jax
import numpy as np

from xmodal.bench import parity_detection, parity_text, parity_vision
from xmodal.bench.harness import run_command
from xmodal.errors import UserError
from xmodal.pretrained.checkpoint import Checkpoint
from xmodal.pretrained.export import save

_LENGTHS = (17, 9, 1)  # text lengths in tokens


@dataclasses.dataclass(frozen=True)
class Difference:
  """Result of one case.

  Attributes:
    parameters: number of parameters of the tower or detector.
    read: relative difference of our outputs from PyTorch's.
    exported: relative difference of PyTorch's outputs after our export from those before.
  """

  parameters: int
  read: float
  exported: float


def compare(case) -> Difference:
  """Reads, runs, exports and reads back one case of parity_text, _vision or _detection."""
  theirs = case.make()
  with tempfile.TemporaryDirectory() as folder:
    original, exported = (os.path.join(folder, name) for name in ('original', 'exported'))
    os.mkdir(original)
    theirs.save_pretrained(original)
    checkpoint = Checkpoint(original)
    variables = checkpoint.load()[0]
    save(exported, checkpoint.module, variables)
    if checkpoint.part == 'text':
      inputs, seen = _texts(case)
      ours = case.run_ours(checkpoint.module, variables, *inputs)
    else:
      inputs, seen = case.inputs(), slice(None)
      module = checkpoint.module.clone(**case.fields)
      ours = jax.device_get(jax.jit(module.apply)(checkpoint.load(module)[0], *inputs))
    expected, again = case.run(theirs, *inputs), case.run(case.load(exported), *inputs)
  count = sum(x.size for x in jax.tree.leaves(variables))
  return Difference(count, *(_difference(x[seen], expected[seen]) for x in (ours, again)))


def _texts(case):
  """((tokens int [B, L], mask bool [B, L]), index of the positions to compare)."""
  tokens = np.random.default_rng(0).integers(2, 37, (len(_LENGTHS), max(_LENGTHS)))
  mask = np.arange(max(_LENGTHS)) < np.array(_LENGTHS)[:, None]
  return (tokens, mask), mask


def _difference(ours, theirs):
  """The largest relative difference, over all outputs."""
  return max(float(np.abs(a - b).max() / np.abs(b).max())
             for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def main(arguments=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--published', action='store_true', help='add a published size (minutes)')
  parser.add_argument('--families', nargs='+', help='default: all')
  return run_command(_run, parser.parse_args(arguments))


def _run(options):
  cases = {}
  for module in (parity_vision, parity_text, parity_detection):
    for case in module.CASES + (module.PUBLISHED if options.published else ()):
      cases.setdefault(case.family, []).append(case)
  families = options.families or list(cases)
  if unknown := set(families) - set(cases):
    raise UserError(f'--families {min(unknown)}: wanted some of {", ".join(cases)}')
  from transformers.utils import logging
  logging.set_verbosity_error()  # it warns of heads that towers do not have
  logging.disable_progress_bar()
  print('| family | cases: parameters | read: largest difference | exported and read by PyTorch |')
  print('|---|---|---|---|')
  for family in families:
    found = [compare(case) for case in cases[family]]
    sizes = sorted(d.parameters for d in found)
    span = ' to '.join(dict.fromkeys(map(_size, (sizes[0], sizes[-1]))))
    print(f'| {family} | {len(found)}: {span} | '
          f'{max(d.read for d in found):.1e} | {max(d.exported for d in found):.1e} |', flush=True)


def _size(count):
  return f'{count / 1e6:.0f}M' if count >= 1e6 else f'{count / 1e3:.0f}k'


if __name__ == '__main__':
  sys.exit(main())
