"""Captions of the embedded shapes, beside the names of their objects; trains in minutes on two
CPU cores."""

from xmodal import config


def get_config():
  c = config.base()
  # As for questions (configs/vqa.py): naming the objects teaches it to look.
  c.mixer.tasks = ('captioning', 'objects')
  c.mixer.weights = (1.0, 10.0)
  c.train.eval_every = 700
  c.train.checkpoint_every = 700
  c.train.steps = 3500
  c.optimizer.learning_rate = 2e-3
  return c
