"""Questions, captions, retrieval and detection in one model, on the same embedded pictures, whose
way through the vision tower all of them share; the config of bench.multitask's table.
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('vqa', 'objects', 'detection', 'captioning', 'retrieval')
  c.mixer.weights = (1.0, 10.0, 1.0, 1.0, 1.0)
  c.data.eval_examples = 500
  c.vqa.question_length = 14
  c.vqa.answer_length = 4
  c.train.batch_size = 32
  c.train.steps = 1000
  c.train.eval_every = 500
  c.train.checkpoint_every = 500
  c.optimizer.learning_rate = 2e-3
  return c
