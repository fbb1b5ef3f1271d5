"""Detection on your own pictures with boxes.

  xmodal check DIR --source coco
  xmodal train --config own_boxes --config.data.root=DIR

For one GPU. Time and score depend on your data.
Data: DIR in COCO's layout, or in another with --config.data.source=yolo, voc, jsonl or
visual_genome; see xmodal/data/README.md.
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('detection',)
  c.data.source = 'coco'
  c.data.keep_aspect = True
  c.data.image_size = 512
  c.data.augment.mirror = True
  c.data.augment.crop = 0.5
  c.data.augment.zoom = 0.3
  c.data.augment.light = 0.2
  c.model.size = 'small'
  c.model.dropout_rate = 0.1
  c.train.batch_size = 32
  c.train.steps = 50_000
  c.train.eval_every = 5000
  c.train.checkpoint_every = 1000
  c.train.ema_decay = 0.999
  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 1000
  return c
