"""Few labelled pictures, and what a model that learned from them says of others; minutes on two CPU
cores.

  python -m xmodal.main --config configs/self_training.py --workdir runs/teacher
  python -m xmodal.augment --checkpoint runs/teacher --images FOLDER --questions FILE --output made
  python -m xmodal.main --config configs/self_training.py --workdir runs/student \
      --config.data.more=made

For labelled pictures of your own: --config.data.source=jsonl --config.data.root=DIR.
"""

from xmodal import config


def get_config():
  c = config.base()
  # Answers are kept where the captions agree: one model has to learn both.
  c.mixer.tasks = ('vqa', 'captioning', 'objects')
  c.mixer.weights = (1.0, 1.0, 10.0)
  c.data.train_examples = 4000  # a tenth of what configs/vqa.py trains on
  c.vqa.question_length = 14
  c.vqa.answer_length = 4
  c.train.eval_every = 700
  c.train.checkpoint_every = 700
  c.train.steps = 3500
  c.optimizer.learning_rate = 2e-3
  return c
