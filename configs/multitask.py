"""Questions, objects and detection in one model, on two embedded sources; minutes on two CPU cores.

Questions and names of objects are of plain scenes, detection is of crowded ones.
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('vqa', 'objects', 'detection')
  c.mixer.weights = (1.0, 10.0, 1.0)
  c.mixer.data.detection.crowded = True
  c.mixer.data.detection.eval_examples = 1000
  c.data.image_size = 64
  c.vqa.question_length = 14
  c.vqa.answer_length = 4
  c.train.batch_size = 32
  c.train.steps = 4000
  c.train.eval_every = 2000
  c.train.checkpoint_every = 1000
  c.optimizer.learning_rate = 2e-3
  return c
