"""Detection of blood cells in BCCD, from random parameters.

  xmodal train --config bccd --config.data.root=DIR
  xmodal train --config bccd --config.data.root=DIR --mode=eval --config.data.eval_split=test

Two CPU cores, 27 minutes with other load. The second command (seed 0): mAP@.5 88.3%, mAP@[.5:.95]
54.2%.
Data: DIR is BCCD's folder in Pascal VOC's layout (github.com/Shenggan/BCCD_Dataset).
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('detection',)
  c.data.source = 'voc'
  c.data.keep_aspect = True
  c.data.image_size = 128
  c.data.augment.mirror = True
  c.data.augment.flip = True
  c.data.augment.crop = 0.3
  c.data.augment.zoom = 0.2
  c.data.augment.light = 0.2
  # Convolutions learn from fewer pictures: a cell looks the same at any place.
  c.model.vision.name = 'resnet'
  c.model.cross.num_layers = 1
  c.model.cross.hidden_dim = 96
  c.model.cross.mlp_dim = 256
  c.train.batch_size = 16
  c.train.steps = 4000
  c.train.eval_every = 500
  c.train.ema_decay = 0.998
  c.optimizer.learning_rate = 2e-3
  c.optimizer.weight_decay = 0.05
  return c
