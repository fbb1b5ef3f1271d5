"""All that can be configured, with its defaults, and the size presets."""

import json
import os
import re

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
import numpy as np

from xmodal import atomic
from xmodal.errors import UserError

# A size fills in what model.vision, model.text, model.cross and model.denoiser leave open.
# small to xl: ViT (arXiv:2010.11929, 2106.04560), T5 v1.1, BERT (small: arXiv:1908.08962, xl:
# Megatron's of 1.3B) and GPT-2 (small: DistilGPT2; large and xl as published) sizes; denoiser:
# base, large and xl as JiT's B, L and H (arXiv:2511.13720).
SIZES = {
    'tiny': dict(
        vit=dict(patch_size=8, hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1, stem='conv',
                 gelu='tanh'),
        resnet=dict(block='basic', stem='small', norm='group', embedding_size=16,
                    downsample_in_first_stage=True, widths=(16, 32, 64), stage_sizes=(1, 1, 1)),
        vgg=dict(stage_sizes=(1, 1, 1), widths=(16, 32, 64)),
        t5=dict(hidden_dim=64, head_dim=16, num_heads=4, mlp_dim=128, num_layers=1,
                num_decoder_layers=1),
        bert=dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
        gpt2=dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
        cross=dict(hidden_dim=64, mlp_dim=128, num_heads=4, num_layers=1),
        denoiser=dict(patch_size=4, hidden_dim=128, mlp_dim=256, num_heads=4, num_layers=5,
                      bottleneck_dim=96)),
    'small': dict(
        vit=dict(patch_size=16, hidden_dim=384, mlp_dim=1536, num_heads=6, num_layers=12),
        resnet=dict(block='basic', norm='group', widths=(64, 128, 256, 512),
                    stage_sizes=(2, 2, 2, 2)),
        vgg=dict(stage_sizes=(1, 1, 2, 2, 2)),
        t5=dict(hidden_dim=512, head_dim=64, num_heads=6, mlp_dim=1024, num_layers=8,
                num_decoder_layers=8),
        bert=dict(hidden_dim=512, mlp_dim=2048, num_heads=8, num_layers=4),
        gpt2=dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=6),
        cross=dict(hidden_dim=384, mlp_dim=1536, num_heads=6, num_layers=4),
        denoiser=dict(patch_size=8, hidden_dim=384, mlp_dim=1024, num_heads=6, num_layers=12,
                      bottleneck_dim=64)),
    'base': dict(
        vit=dict(patch_size=16, hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
        resnet=dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
                    stage_sizes=(3, 4, 6, 3)),
        vgg=dict(stage_sizes=(2, 2, 3, 3, 3)),
        t5=dict(hidden_dim=768, head_dim=64, num_heads=12, mlp_dim=2048, num_layers=12,
                num_decoder_layers=12),
        bert=dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
        gpt2=dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=12),
        cross=dict(hidden_dim=768, mlp_dim=3072, num_heads=12, num_layers=6),
        denoiser=dict(patch_size=16, hidden_dim=768, mlp_dim=2048, num_heads=12, num_layers=12,
                      bottleneck_dim=128)),
    'large': dict(
        vit=dict(patch_size=16, hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=24),
        resnet=dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
                    stage_sizes=(3, 4, 23, 3)),
        vgg=dict(stage_sizes=(2, 2, 4, 4, 4)),
        t5=dict(hidden_dim=1024, head_dim=64, num_heads=16, mlp_dim=2816, num_layers=24,
                num_decoder_layers=24),
        bert=dict(hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=24),
        gpt2=dict(hidden_dim=1280, mlp_dim=5120, num_heads=20, num_layers=36),
        cross=dict(hidden_dim=1024, mlp_dim=4096, num_heads=16, num_layers=6),
        denoiser=dict(patch_size=16, hidden_dim=1024, mlp_dim=2816, num_heads=16, num_layers=24,
                      bottleneck_dim=128)),
    'xl': dict(
        vit=dict(patch_size=14, hidden_dim=1408, mlp_dim=6144, num_heads=16, num_layers=40),
        resnet=dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
                    stage_sizes=(3, 8, 36, 3)),
        vgg=dict(stage_sizes=(2, 2, 4, 4, 4)),
        t5=dict(hidden_dim=2048, head_dim=64, num_heads=32, mlp_dim=5120, num_layers=24,
                num_decoder_layers=24),
        bert=dict(hidden_dim=2048, mlp_dim=8192, num_heads=32, num_layers=24),
        gpt2=dict(hidden_dim=1600, mlp_dim=6400, num_heads=25, num_layers=48),
        cross=dict(hidden_dim=1408, mlp_dim=6144, num_heads=16, num_layers=8),
        denoiser=dict(patch_size=16, hidden_dim=1280, mlp_dim=3456, num_heads=16, num_layers=32,
                      bottleneck_dim=256)),
}


def base() -> ConfigDict:
  """Every key and its default. A file in configs/ changes what differs and no more."""
  c = ConfigDict()
  c.seed = 0  # 32 bits: of parameters, order of the data, dropout

  c.model = ConfigDict()
  c.model.size = 'tiny'  # tiny, small, base, large, xl
  c.model.dtype = 'auto'  # of the computation: bfloat16 on accelerators, float32 on CPU
  c.model.attention = 'xla'  # or cudnn (NVIDIA, bfloat16, no dropout)
  c.model.remat = 'none'  # full: recompute layers in the backward pass; dots: keep matrix products
  c.model.dropout_rate = 0.0
  # Adapters on kernels whose paths match, trained while the rest of their towers is frozen.
  c.model.lora = ConfigDict()
  c.model.lora.pattern = ''  # such as 'text_tower/.*/(query|value)/kernel'; '': none
  c.model.lora.rank = 8
  c.model.lora.alpha = 16.0  # over the rank: how much adapters count
  c.model.lora.dropout_rate = 0.0
  c.model.vision = ConfigDict()
  c.model.vision.name = 'vit'  # or resnet, vgg
  # A checkpoint in HuggingFace's layout, its folder or its name on the hub; '': from nothing.
  c.model.vision.pretrained = ''
  c.model.text = ConfigDict()
  c.model.text.name = 't5'  # or bert, gpt2, beside which a T5 decoder of the size writes answers
  c.model.text.pretrained = ''  # likewise, and its tokenizer
  c.model.text.tokenizer = ''  # folder with a HuggingFace tokenizer; '': learned from the data
  c.model.text.vocab_size = 8000  # of a learned tokenizer, at most
  # T5 from nothing: how much its heads favour neighbouring words at the start; None: not, as
  # published, and so their order counts for little until it is learned.
  c.model.text.neighbor_bias = placeholder(float)
  c.model.cross = ConfigDict()
  c.model.cross.variant = 'co_attention'  # two streams; merged: one of both
  c.model.denoiser = ConfigDict()  # of image generation
  # None: as the size says.
  common = ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')
  for tower, more in (('vision', ('patch_size',)), ('text', ('head_dim', 'num_decoder_layers')),
                      ('cross', ()), ('denoiser', ('patch_size',))):
    for key in (*common, *more):
      c.model[tower][key] = placeholder(int)

  c.data = ConfigDict()
  c.data.source = 'shapes'  # shapes, jsonl, coco, voc, visual_genome, vqa_v2, vqa_rad
  c.data.root = ''  # folder of the data; shapes needs none
  # Folders whose train.jsonl is trained on too, such as ('made',): what xmodal.augment writes.
  c.data.more = ()
  c.data.train_split = 'train'
  c.data.eval_split = 'val'
  c.data.train_examples = 40_000  # shapes only
  c.data.eval_examples = 2_100  # shapes only
  c.data.crowded = False  # shapes only: up to ten that overlap and a text for one, no questions
  c.data.numbers = False  # shapes only: questions that a number answers
  c.data.drawn = False  # shapes only: one or two, with a caption that says all that matters
  c.data.answers_share = 1.0  # of the training records, that keep answers and reasons
  c.data.without = ()  # crowded and drawn: names such as 'red circle', kept out of training
  c.data.image_size = placeholder(int)  # pixels, of both sides; None: as the vision tower says
  c.data.keep_aspect = False  # True: pictures keep their shape, and the rest is padding
  c.data.blank = ''  # 'image' or 'question': hidden from the model, for baselines
  c.data.memory_mb = 1024  # of a host, for decoded pictures: small data sets are decoded once
  c.data.max_bad_share = 0.05  # of unreadable pictures; above it training stops
  c.data.augment = ConfigDict()
  c.data.augment.mirror = False
  c.data.augment.zoom = 0.0
  c.data.augment.light = 0.0
  c.data.augment.crop = 0.0
  c.data.augment.flip = False  # top to bottom: for pictures without up and down

  c.mixer = ConfigDict()
  c.mixer.tasks = ('vqa',)
  c.mixer.weights = (1.0,)  # one a task: of its loss; of balances: see xmodal/mixer/balance.py
  # joint: every task in every step; proportional: one task a step, as large as its source is;
  # temperature: size ** (1 / temperature); round_robin; alternating: see turns.
  c.mixer.sampling = 'joint'
  c.mixer.temperature = 2.0
  # Of alternating: a regular expression and its number of steps, one turn after the other.
  c.mixer.turns = ()  # such as (('vision_tower', 100), ('text_tower|cross_modal|heads', 100))
  c.mixer.turns_of = 'parameters'  # all else stays as it is; tasks: only these are trained
  c.mixer.balance = 'fixed'  # or uncertainty, dwa, gradnorm, pcgrad, famo: xmodal/mixer/balance.py
  c.mixer.balance_rate = 0.025  # how fast uncertainty, gradnorm and famo learn their weights
  c.mixer.gradnorm_alpha = 1.5  # how much tasks that lag behind are pulled along
  c.mixer.dwa_window = 100  # steps of a task whose mean loss is compared with that of those before
  c.mixer.measure_every = 100  # steps, gradient norms and cosines of tasks; 0: never

  c.vqa = ConfigDict()
  c.vqa.classifier = True
  c.vqa.generation_weight = 0.1  # lambda of l_cls + lambda * l_gen; 0: no decoder
  c.vqa.max_answers = 3129  # of the answer list; VQAv2's usual number
  c.vqa.question_length = 24  # tokens
  c.vqa.answer_length = 6  # tokens
  c.vqa.beams = 1  # of the search for the written answer; 1: the likeliest token each time

  c.objects = ConfigDict()
  c.objects.max_names = 200
  c.objects.sampled_names = 256  # see detection.sampled_names
  c.objects.max_objects = 16

  c.detection = ConfigDict()
  c.detection.max_names = 1000
  # Names that a training step looks for: those of the batch, and absent ones drawn at random up to
  # this number. Evaluation looks for all.
  c.detection.sampled_names = 256
  c.detection.max_objects = 100  # of one picture, in training
  c.detection.queries = 0  # learned ones; 0: one for each image token
  c.detection.layers = 1  # of the decoder of learned queries
  c.detection.glimpse = 12  # cells across, of a query's look at the pixels around its box; 0: none
  c.detection.expression_length = 16  # tokens
  c.detection.expression_weight = 1.0  # of the losses of expressions, beside those of names
  c.detection.threshold = 0.5  # of the scores that are shown to people

  c.captioning = ConfigDict()
  c.captioning.caption_length = 32  # tokens
  c.captioning.max_captions = 5  # of one picture, in training
  c.captioning.beams = 1  # of the search; 1: the likeliest token each time
  c.captioning.temperature = 0.0  # above 0: tokens are drawn at random instead
  c.captioning.top_k = 0  # of those, only from the k likeliest; 0: all
  c.captioning.top_p = 1.0  # and from the fewest that hold this probability; 1: all

  c.regression = ConfigDict()
  c.regression.generation_weight = 0.1  # lambda of l_reg + lambda * l_gen; 0: no decoder
  c.regression.question_length = 24  # tokens
  c.regression.number_length = 8  # tokens of a written number
  c.regression.beams = 1  # of the search for the written number

  c.retrieval = ConfigDict()
  c.retrieval.loss = 'sigmoid'  # of all pairs (SigLIP), or softmax (CLIP)
  c.retrieval.embedding_dim = 256  # of the space that pictures and texts share
  c.retrieval.caption_length = 32  # tokens
  c.retrieval.max_captions = 5  # of a picture; as many as COCO's evaluation takes

  c.generation = ConfigDict()
  c.generation.caption_length = 32  # tokens
  c.generation.max_captions = 5  # of one picture, of which each visit reads one
  c.generation.predict = 'x'  # the clean picture; or v, noise: the loss is of v whichever it is
  c.generation.patches = 'overlap'  # squares of twice the side, in and out; plain: as in JiT
  c.generation.time_mean = -0.8  # of the logit of the times trained on: 0 is noise, 1 a picture
  c.generation.time_std = 0.8
  # Steps in which times begin close to where the text tells the most, and from a third of them on
  # spread: a model from nothing learns what texts say there. 0: none.
  c.generation.early_steps = 0
  c.generation.early_mean = -1.6  # of the logit of those times; twice the side: 0.7 less
  c.generation.noises = 1  # noisy pictures of each example in a step, at different times
  c.generation.caption_drop = 0.1  # of the captions, hidden in training: guidance needs it
  c.generation.guidance = 3.0  # 1: none; how far to go from the picture of no text to that of this
  c.generation.guidance_from = 0.1  # times between which there is guidance
  c.generation.guidance_to = 1.0
  c.generation.sampler = 'heun'  # two looks a step; euler: one
  c.generation.steps = 20

  c.train = ConfigDict()
  c.train.steps = 1000
  c.train.batch_size = 64
  c.train.accumulation = 1  # micro-batches a step
  # Examples that evaluation predicts at once. 0: those of a micro-batch, divided by the beams,
  # captions or guidance that multiply an example there (xmodal/train/evaluate.py).
  c.train.eval_batch_size = 0
  c.train.ema_decay = 0.0  # 0: no moving average of the parameters
  c.train.log_every = 20
  c.train.eval_every = 500
  c.train.checkpoint_every = 500
  c.train.keep_checkpoints = 2
  c.train.samples = 12  # pictures drawn at each evaluation

  c.optimizer = ConfigDict()
  c.optimizer.name = 'adamw'  # or muon: matrices of layers move by orthogonal steps
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 100
  # After the warm-up: cosine or linear, down to train.steps; constant; wsd: constant, then down in
  # the last decay_share of train.steps. The last two hold the rate when train.steps is raised.
  c.optimizer.schedule = 'cosine'
  c.optimizer.decay_share = 0.2  # of wsd
  c.optimizer.end_share = 0.01  # of the learning rate, left at the end; not of constant
  c.optimizer.weight_decay = 0.05
  c.optimizer.clip_norm = 1.0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.98
  c.optimizer.eps = 1e-8
  c.optimizer.muon_rate = 1.0  # of the learning rate, for those matrices
  c.optimizer.frozen = ''  # such as 'vision_tower': parameters whose paths match never change
  c.optimizer.vision_rate = 1.0  # of the learning rate, in the vision tower
  c.optimizer.text_rate = 1.0  # likewise
  c.optimizer.layer_decay = 1.0  # of the learning rate, from each layer to the one before

  c.mesh = ConfigDict()
  c.mesh.data = -1  # -1: all devices that the other two leave
  c.mesh.fsdp = 1
  c.mesh.tensor = 1

  # What a task reads instead of config.data: --config.mixer.data.detection.source=coco.
  c.mixer.data = ConfigDict({task: _unset(c.data) for task in c if task not in _NO_TASKS})
  c.lock()
  return c


_NO_TASKS = ('seed', 'model', 'data', 'mixer', 'train', 'optimizer', 'mesh')
# Keys of data that all tasks share: the model's input, and memory of the host.
DATA_OF_THE_RUN = ('image_size', 'memory_mb')


def _unset(section):
  """The keys of a section, with types and without values."""
  return {key: _unset(value) if isinstance(value, ConfigDict) else placeholder(type(value))
          for key, value in section.items() if key not in DATA_OF_THE_RUN}


# Of pictures for a vision tower that begins from nothing, where the config names none.
IMAGE_SIZE = 48

# Of float32, which is what a step computes in: lowest above 0, highest below 1, highest.
ABOVE_ZERO = float(np.finfo(np.float32).tiny)
_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
HIGHEST = float(np.finfo(np.float32).max)
_HIGHEST_INT = 2**31 - 1
# Lowest and highest value of every key that is a number; None: of its type.
_RANGES = {
    'seed': (0, 2**32 - 1),  # JAX would take others for one of these
    **{f'model.{part}.{key}': (1, None)
       for part in ('vision', 'text', 'cross', 'denoiser')
       for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers')},
    'model.vision.patch_size': (1, None), 'model.denoiser.patch_size': (1, None),
    'model.text.head_dim': (1, None), 'model.text.num_decoder_layers': (1, None),
    'model.dropout_rate': (0, 0.99), 'model.lora.rank': (1, None),
    'model.lora.alpha': (ABOVE_ZERO, None), 'model.lora.dropout_rate': (0, 0.99),
    'model.text.vocab_size': (1, None), 'model.text.neighbor_bias': (0, None),
    'data.image_size': (8, None), 'data.train_examples': (1, None), 'data.eval_examples': (1, None),
    'data.answers_share': (ABOVE_ZERO, 1), 'data.max_bad_share': (0, 1),
    'data.memory_mb': (0, None),
    'data.augment.zoom': (0, 0.99),
    'data.augment.light': (0, 1), 'data.augment.crop': (0, 0.9),
    'vqa.generation_weight': (0, None), 'vqa.max_answers': (1, None),
    'vqa.question_length': (2, None), 'vqa.answer_length': (2, None), 'vqa.beams': (1, None),
    'objects.max_names': (1, None), 'objects.sampled_names': (1, None),
    'objects.max_objects': (1, None),
    'detection.max_names': (1, None), 'detection.sampled_names': (1, None),
    'detection.max_objects': (1, None),
    'detection.queries': (0, None), 'detection.layers': (1, None),
    'detection.glimpse': (0, None),
    'detection.expression_length': (2, None), 'detection.expression_weight': (ABOVE_ZERO, None),
    'detection.threshold': (0, 1),
    'captioning.caption_length': (2, None), 'captioning.max_captions': (1, None),
    'captioning.beams': (1, None), 'captioning.temperature': (0, None),
    'captioning.top_k': (0, None), 'captioning.top_p': (0, 1),
    'regression.generation_weight': (0, None), 'regression.question_length': (2, None),
    'regression.number_length': (2, None), 'regression.beams': (1, None),
    'retrieval.embedding_dim': (1, None), 'retrieval.caption_length': (2, None),
    'retrieval.max_captions': (1, None),
    'generation.caption_length': (2, None), 'generation.max_captions': (1, None),
    'generation.time_mean': (None, None), 'generation.time_std': (ABOVE_ZERO, None),
    'generation.early_steps': (0, None), 'generation.early_mean': (None, None),
    'generation.noises': (1, None),
    'generation.caption_drop': (0, 1), 'generation.guidance': (0, None),
    'generation.guidance_from': (0, 1), 'generation.guidance_to': (0, 1),
    'generation.steps': (1, None),
    'mixer.temperature': (0.1, None),  # below, powers of sizes overflow
    'mixer.balance_rate': (0, None),
    'mixer.gradnorm_alpha': (0, None), 'mixer.dwa_window': (1, None),
    'mixer.measure_every': (0, None),
    'train.steps': (1, None), 'train.batch_size': (1, None), 'train.accumulation': (1, None),
    'train.eval_batch_size': (0, None),
    'train.log_every': (1, None), 'train.eval_every': (1, None),
    'train.checkpoint_every': (1, None), 'train.keep_checkpoints': (1, None),
    'train.samples': (0, None), 'train.ema_decay': (0, 0.999999),
    'optimizer.learning_rate': (ABOVE_ZERO, None), 'optimizer.warmup_steps': (0, None),
    'optimizer.decay_share': (ABOVE_ZERO, 1), 'optimizer.end_share': (0, 1),
    'optimizer.weight_decay': (0, None), 'optimizer.clip_norm': (ABOVE_ZERO, None),
    'optimizer.b1': (0, _BELOW_ONE), 'optimizer.b2': (0, _BELOW_ONE),
    'optimizer.eps': (ABOVE_ZERO, None), 'optimizer.muon_rate': (ABOVE_ZERO, None),
    'optimizer.vision_rate': (ABOVE_ZERO, None), 'optimizer.text_rate': (ABOVE_ZERO, None),
    'optimizer.layer_decay': (ABOVE_ZERO, 1),
    'mesh.data': (-1, None), 'mesh.fsdp': (1, None), 'mesh.tensor': (1, None),
}


def check(config: ConfigDict) -> None:
  """Raises UserError at the first value that means nothing."""
  for key, (low, high) in _RANGES.items():
    value = config
    for part in key.split('.'):
      value = value[part]
    if value is not None:
      check_number(f'config.{key}', value, low, high)
  if config.generation.guidance_from > config.generation.guidance_to:
    raise UserError(f'config.generation.guidance_from={config.generation.guidance_from}: wanted at '
                    f'most config.generation.guidance_to={config.generation.guidance_to}')
  _check_towers(config)
  if config.data.blank not in ('', 'image', 'question'):
    raise UserError(f'config.data.blank={config.data.blank!r}: wanted image, question or nothing')
  for key, pattern in (('model.lora.pattern', config.model.lora.pattern),
                       ('optimizer.frozen', config.optimizer.frozen)):
    try:
      re.compile(pattern)
    except re.error as error:
      raise UserError(f'config.{key}={pattern!r} is no regular expression ({error})') from error


def check_number(name: str, value: float, low: float | None, high: float | None) -> None:
  """Raises UserError if a value is no number in low..high, or is NaN or infinite.

  None: as low or high as float32, or of whole numbers int32, goes.
  """
  most = _HIGHEST_INT if isinstance(value, int) else HIGHEST
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  # So that NaN is outside.
  if is_number and (-most if low is None else low) <= value <= (most if high is None else high):
    return
  wanted = 'above 0' if low == ABOVE_ZERO else 'a number' if low is None else f'{low} or more'
  if high == _BELOW_ONE:
    wanted += ', below 1'
  elif high is not None:
    wanted = f'above 0, at most {high}' if low == ABOVE_ZERO else f'{low} to {high}'
  elif is_number and not value <= (low or 0):  # NaN, or too much
    wanted += f', at most {most:.3g}'
  raise UserError(f'{name}={value}: wanted {wanted}')


def _check_towers(config):
  """Sizes of all that is not pretrained, before any data are read."""
  for tower in _TOWERS:
    if not config.model[tower].get('pretrained'):
      tower_sizes(config, tower)


def tower_sizes(config, tower: str) -> dict:
  """The size preset of one of _TOWERS, with the config's own values over it."""
  size = config.model.size
  if size not in SIZES:
    raise UserError(f'config.model.size={size!r}: wanted one of {", ".join(SIZES)}')
  name = config.model[tower].get('name', tower)
  if name not in _TOWERS[tower]:
    raise UserError(f'config.model.{tower}.name={name!r}: wanted one of '
                    f'{", ".join(_TOWERS[tower])}')
  preset = SIZES[size][name]
  own = own_sizes(config, tower)
  if name in ('bert', 'gpt2'):
    own.pop('num_decoder_layers', None)  # see decoder_sizes
  if unknown := set(own) - set(preset):
    raise UserError(f'config.model.{tower}.{min(unknown)} means nothing to {name}; leave it out')
  sizes = {**preset, **own}
  heads = sizes.get('num_heads', 1)
  if 'head_dim' not in sizes and sizes.get('hidden_dim', heads) % heads:
    raise UserError(f'config.model.{tower}: hidden_dim={sizes["hidden_dim"]} does not divide into '
                    f'num_heads={heads} heads; change one of them')
  if tower == 'cross' and sizes['hidden_dim'] < 2:
    raise UserError(f'config.model.cross.hidden_dim={sizes["hidden_dim"]}: wanted 2 or more, one '
                    'for rows and one for columns')
  return sizes


def decoder_sizes(config) -> dict:
  """Sizes of the T5 decoder beside a text tower that cannot write: the preset's, but its depth."""
  sizes = SIZES[config.model.size]['t5']
  layers = config.model.text.num_decoder_layers
  return sizes if layers is None else {**sizes, 'num_decoder_layers': layers}


def own_sizes(config, tower: str) -> dict:
  """The sizes that the config itself gives for one of _TOWERS."""
  return {k: v for k, v in config.model[tower].items() if v is not None and k in _SIZE_KEYS}


_TOWERS = {'vision': ('vit', 'resnet', 'vgg'), 'text': ('t5', 'bert', 'gpt2'), 'cross': ('cross',),
           'denoiser': ('denoiser',)}
_SIZE_KEYS = frozenset(
    'patch_size hidden_dim head_dim mlp_dim num_heads num_layers num_decoder_layers'.split())


def save(config: ConfigDict, path: str) -> None:
  """Writes a config as JSON, whole or not at all."""
  with atomic.written(path) as f:
    f.write(config.to_json(indent=2) + '\n')


def load(path: str) -> ConfigDict:
  """Reads a config that save wrote; keys unknown to this version are an error."""
  if not os.path.exists(path):
    raise UserError(f'no file {path}; wanted the config.json that training writes')
  config = base()
  try:
    with open(path, encoding='utf-8') as f:
      values = json.load(f)
  except ValueError as error:  # not JSON, or not UTF-8
    raise UserError(f'{path} is damaged ({_line(error)}); take that of another checkpoint of the '
                    'run') from error
  try:
    config.update(values)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} does not fit this version of xmodal: {_line(error)}') from error
  return config


def _line(error) -> str:
  return ' '.join(str(error.args[0] if error.args else error).split())
