"""A model and data small enough to train in a test; also a file for --config."""

import functools
import signal

import jax

from xmodal import config
from xmodal.train import run as runs
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.plan import Plan


def get_config():
  c = config.base()
  for tower in ('vision', 'text', 'cross', 'denoiser'):
    c.model[tower].hidden_dim = 16
    c.model[tower].mlp_dim = 32
    c.model[tower].num_heads = 2
    c.model[tower].num_layers = 1
  c.model.text.head_dim = 8
  c.model.text.vocab_size = 120
  c.data.image_size = 32
  c.data.train_examples = 64
  c.data.eval_examples = 20
  c.mixer.tasks = ('vqa', 'objects')
  c.mixer.weights = (1.0, 1.0)
  c.vqa.question_length = 12
  c.generation.steps = 2
  c.train.batch_size = 8
  c.train.steps = 6
  c.train.log_every = 1
  c.train.eval_every = 6
  c.train.checkpoint_every = 3
  c.train.samples = 4
  c.optimizer.warmup_steps = 1
  return c


def changed(**values):
  """get_config with some keys changed: changed(train__steps=3) is --config.train.steps=3."""
  c = get_config()
  c.update_from_flattened_dict({key.replace('__', '.'): value for key, value in values.items()})
  return c


def train(workdir, c=None):
  """Trains in this process; returns what final.json holds ({} if a SIGTERM came)."""
  handler = signal.getsignal(signal.SIGTERM)
  try:
    return runs.train(Plan(c or get_config(), str(workdir)))
  finally:
    signal.signal(signal.SIGTERM, handler)


@functools.cache
def _abstract():
  return Plan(get_config(), 'unused').abstract


def restored(workdir, warnings=None, abstract=None):
  """The state of the newest intact checkpoint, as numpy arrays; None if there is none.

  `abstract`: shapes of a state of another config.

  Messages about damaged ones go to the list `warnings`; without it they are errors.
  """
  checkpoints = Checkpoints(str(workdir), keep=5)
  found = []
  state = checkpoints.restore(abstract or _abstract(), found.append)
  checkpoints.close()
  if warnings is None:
    assert not found, found
  else:
    warnings += found
  return jax.device_get(state)
