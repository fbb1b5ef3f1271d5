"""A run of a few seconds with many checkpoints; a file for --config."""

from xmodal import config


def get_config():
  c = config.base()
  for tower in ('vision', 'text', 'cross'):
    c.model[tower].hidden_dim = 16
    c.model[tower].mlp_dim = 32
    c.model[tower].num_heads = 2
    c.model[tower].num_layers = 1
  c.model.text.head_dim = 8
  c.model.text.vocab_size = 120
  c.data.image_size = 32
  c.data.train_examples = 64
  c.data.eval_examples = 24
  c.train.batch_size = 8
  c.train.eval_batch_size = 8
  c.train.steps = 24
  c.train.log_every = 1
  c.train.eval_every = 12
  c.train.checkpoint_every = 2
  c.train.samples = 0
  c.optimizer.warmup_steps = 1
  return c
