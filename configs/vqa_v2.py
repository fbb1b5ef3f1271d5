"""Questions about COCO's pictures, VQAv2, from random parameters.

  xmodal train --config vqa_v2 --config.data.root=DIR

For several accelerators; time and score have not been measured.
Data: DIR holds the questions, annotations and pictures as published (visualqa.org).
"""

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
