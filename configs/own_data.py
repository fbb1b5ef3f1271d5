"""Questions about your own pictures.

  xmodal check DIR
  xmodal train --config own_data --config.data.root=DIR

For one GPU; time and score depend on your data. A trial on a CPU: --config.model.size=tiny
--config.data.image_size=48 --config.train.steps=1000.
Data: DIR holds train.jsonl, val.jsonl and pictures, or what --config.data.source=imagefolder, csv,
parquet or webdataset reads; see xmodal/data/README.md.
"""

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
