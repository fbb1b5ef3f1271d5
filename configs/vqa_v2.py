"""VQAv2 as published; --config.data.root=DIR names the folder with its JSON files and pictures."""

from xmodal import config


def get_config():
  c = config.base()
  c.model.size = 'base'
  c.data.source = 'vqa_v2'
  c.data.image_size = 224
  c.train.steps = 90_000
  c.train.batch_size = 256
  c.train.eval_every = 10_000
  c.train.checkpoint_every = 2_000
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 2_000
  return c
