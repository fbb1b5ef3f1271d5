"""Drawing what a text says, on embedded scenes; for two CPU cores.

Four names are left out of training, to see whether they can be asked for all the same.
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('generation',)
  c.data.drawn = True
  c.data.without = ('red circle', 'blue square', 'green triangle', 'yellow cross')
  c.data.image_size = 32
  c.data.train_examples = 100_000
  c.data.eval_examples = 300
  c.model.text.num_layers = 2
  c.model.denoiser.patch_size = 8
  c.model.denoiser.hidden_dim = 192
  c.model.denoiser.mlp_dim = 512
  c.model.denoiser.num_heads = 6
  c.generation.caption_length = 14
  # Where noise hides the colors of things this small, only the text tells them: of times around 0.7
  # alone the model did not learn to read it. Shapes are learned later, so the times spread widely.
  c.generation.time_mean = -0.6
  c.generation.time_std = 1.2
  c.generation.steps = 10
  c.train.batch_size = 32
  c.train.steps = 10_000
  c.train.eval_every = 2500
  c.train.checkpoint_every = 2500
  c.train.ema_decay = 0.999
  c.optimizer.learning_rate = 2e-3
  return c
