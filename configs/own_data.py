"""Your own pictures and questions; --config.data.root=DIR names the folder of train.jsonl."""

from xmodal import config


def get_config():
  c = config.base()
  c.data.source = 'jsonl'
  c.data.image_size = 224
  c.data.augment.zoom = 0.15
  c.data.augment.light = 0.2
  c.model.size = 'small'
  c.model.dropout_rate = 0.1
  c.vqa.answer_length = 12
  c.train.steps = 10_000
  c.train.eval_every = 1000
  c.train.checkpoint_every = 1000
  c.train.ema_decay = 0.999
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 500
  return c
