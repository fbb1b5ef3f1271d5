"""Image generation from captions, 64x64 pixels.

  xmodal train --config generation_64

One GPU with cuDNN attention: one H100 trains on 1,390 pictures a second. The score of all 10,000
steps has not been measured; see configs/README.md for a shorter run.
Data: embedded scenes of one or two shapes, no download.
"""

from xmodal import config


def get_config():
  c = config.base()
  c.mixer.tasks = ('generation',)
  c.data.drawn = True
  c.data.without = ('red circle', 'blue square', 'green triangle', 'yellow cross')
  c.data.image_size = 64
  c.data.train_examples = 1_000_000
  c.data.eval_examples = 1_000
  c.model.attention = 'cudnn'
  c.model.text.num_layers = 2
  # "left of" depends on the order of words, to which a T5 pays little attention at first.
  c.model.text.neighbor_bias = 5.0
  c.model.denoiser.hidden_dim = 256
  c.model.denoiser.mlp_dim = 512
  c.model.denoiser.num_heads = 4
  c.model.denoiser.num_layers = 8
  c.model.denoiser.patch_size = 4
  c.generation.caption_length = 14
  # More pixels show the same scene through more noise: train nearer to noise.
  c.generation.time_mean = -1.0
  c.generation.time_std = 0.9
  c.generation.early_mean = -2.3
  c.generation.early_steps = 1_500
  # To make a picture takes longer than to learn from it once.
  c.generation.noises = 4
  c.train.batch_size = 128
  c.train.steps = 10_000
  c.train.log_every = 100
  c.train.eval_every = 5_000
  c.train.checkpoint_every = 5_000
  c.train.ema_decay = 0.999
  c.optimizer.name = 'muon'
  c.optimizer.muon_rate = 2.0
  c.optimizer.warmup_steps = 500
  return c
