"""Questions about radiology images, VQA-RAD, from random parameters.

  xmodal train --config vqa_rad --config.data.root=DIR

Two CPU cores, two minutes. With --config.data.train_split=train+val --config.data.eval_split=test,
three seeds: closed 57.0 +- 1.6%, open 11.9 +- 0.3%; from questions alone 55.5% and 11.2%.
Data: DIR holds the files as distributed (osf.io/89kps).
"""

from xmodal import config


def get_config():
  c = config.base()
  c.data.source = 'vqa_rad'
  c.data.image_size = 96
  c.data.augment.zoom = 0.15
  c.data.augment.light = 0.2
  c.model.dropout_rate = 0.1
  c.model.vision.patch_size = 16
  c.vqa.max_answers = 600
  c.vqa.answer_length = 12
  c.train.steps = 700
  c.train.eval_every = 350
  c.train.ema_decay = 0.995
  c.optimizer.learning_rate = 2e-3
  c.optimizer.weight_decay = 0.1
  return c
