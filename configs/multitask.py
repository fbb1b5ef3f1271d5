"""Questions, object names, captions, retrieval, detection and image generation in one model.

  xmodal train --config multitask

For two CPU cores; time and scores have not been measured.
Data: embedded, no download: crowded scenes for detection, scenes of one or two shapes for
generation, plain ones for all else, whose pictures pass the towers once for all.
"""

from xmodal import config


def get_config():
  c = config.base()
  # Naming the objects makes the model use the picture, see configs/vqa.py.
  c.mixer.tasks = ('vqa', 'objects', 'captioning', 'retrieval', 'detection', 'generation')
  c.mixer.weights = (1.0, 10.0, 1.0, 1.0, 1.0, 1.0)
  c.mixer.data.detection.crowded = True
  c.mixer.data.detection.eval_examples = 500
  c.mixer.data.generation.drawn = True
  c.mixer.data.generation.eval_examples = 100
  c.data.eval_examples = 1000
  c.data.image_size = 64
  c.vqa.question_length = 14
  c.vqa.answer_length = 4
  c.generation.caption_length = 14
  c.generation.steps = 10
  c.model.denoiser.patch_size = 8
  c.train.batch_size = 32
  c.train.steps = 3000
  c.train.eval_every = 1000
  c.train.checkpoint_every = 1000
  c.optimizer.learning_rate = 2e-3
  return c
