"""Image generation from texts, by flow matching in pixels (arXiv:2511.13720)."""

import base64
from collections.abc import Callable, Mapping
import copy
import dataclasses
import io
import json
import os
import re

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from PIL import Image

from xmodal.data.example import Example
from xmodal.data.overview import Sampled, overview_of
from xmodal.data.pictures import images
from xmodal.data.pictures.augmentation import Transform
from xmodal.data.scenes import judge
from xmodal.data.scenes.drawings import parse
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import frechet
from xmodal.models import parts
from xmodal.models.attention import usable
from xmodal.models.denoiser import flow
from xmodal.models.denoiser.denoiser import PATCHES, Denoiser
from xmodal.models.layers import remat_policy
from xmodal.options import ABOVE_ZERO, Option
from xmodal.tasks import lengths
from xmodal.tasks.described import Described
from xmodal.tasks.drawing import card
from xmodal.tasks.generation.head import GenerationHead
from xmodal.tasks.task import TASKS, Task
from xmodal.word_patterns import WORD

_LEAST_FOR_FRECHET = 50  # pictures
_SHOWN_WORDS = 5
_WORD = re.compile(rf"{WORD}(?:[_']{WORD})*")

OPTIONS = {
    'caption_length': Option(32, 'Tokens of a caption.', low=2),
    'max_captions': Option(5, 'Maximum number of captions per picture; a training step samples '
                           'one.', low=1),
    'predict': Option('x', 'What the denoiser predicts: the clean image (x), the velocity (v) or '
                      'the noise; the loss is that of v for all three.', choices=flow.PREDICTS),
    'patches': Option('overlap', 'overlap: tokens read and write squares of twice the side; plain: '
                      'as in JiT.', choices=PATCHES),
    'time_mean': Option(-0.8, 'Mean of logit(t) for training times t; t = 0 is noise, t = 1 the '
                        'image.'),
    'time_std': Option(0.8, 'Standard deviation of logit(t).', low=ABOVE_ZERO),
    'early_steps': Option(0, 'Steps in which the mean of logit(t) moves from early_mean to '
                          'time_mean; a model trained from scratch learns to use texts there. '
                          '0: none.',
                          low=0),
    'early_mean': Option(-1.6, 'Initial mean of logit(t); 0.7 less for twice the side.'),
    'noises': Option(1, 'Noisy versions of each example per step, at different times.', low=1),
    'caption_drop': Option(0.1, 'Share of captions dropped in training; required for guidance.',
                           low=0, high=1),
    'guidance': Option(3.0, 'Classifier-free guidance; 1: none.', low=0, may_change=True),
    'guidance_from': Option(0.1, 'Time at which guidance begins.', low=0, high=1, may_change=True),
    'guidance_to': Option(1.0, 'Time at which guidance ends.', low=0, high=1, may_change=True),
    'sampler': Option('heun', 'heun: two evaluations per step; euler: one.', choices=flow.SAMPLERS,
                      may_change=True),
    'steps': Option(20, 'Steps of sampling.', low=1, may_change=True)}


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImage:
  """A picture generated for a caption.

  Attributes:
    image: uint8 [H, W, 3], RGB, at the size of the model's input (config.data.image_size).
    truth: the example's picture, likewise; None for a user's query.
    loss: the v-loss on it (mean squared error of velocities, pixels in -1..1), at a time and noise
      derived from the example; None for a user's query.
  """

  image: np.ndarray
  truth: np.ndarray | None = None
  loss: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
  """Pictures generated for one text, as many as --n.

  Attributes:
    images: uint8 [N, H, W, 3], RGB, at the size of the model's input.
    right: number of images that show the text; None: cannot be judged.
  """

  images: np.ndarray
  right: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """A user's picture to change.

  Attributes:
    strength: 0..1, share of the sampling path from noise that is repeated; 1: all of it, which
      keeps nothing.
    mask: bool [H, W], True where to repaint; None: everywhere.
  """

  strength: float = 1.0
  mask: np.ndarray | None = None


@TASKS.register('generation', options=OPTIONS)
class Generation(Task):
  """Generates pictures for captions.

  The per-example loss is the mean squared error of velocities over its pixels, at a
  random time and with random noise. Each training step samples one of the captions, or
  drops them, so that the model also learns to generate without a text.
  """

  name = 'generation'
  needs = ('captions',)
  loss_weights = {'v': 1.0}
  main_score = 'main'  # faithfulness if pictures can be judged, else minus the loss
  draws = True
  query_options = ('n', 'guidance', 'steps', 'seed', 'mask', 'strength', 'progress')

  def __init__(self, config, tokenizer: Tokenizer, learned: Mapping):
    """Creates the task.

    Args:
      config: the whole config.
      tokenizer: tokenizer of captions.
      learned: facts of the training examples, see from_data.
    """
    own = config.generation
    self._config, self._tokenizer, self._learned = config, tokenizer, dict(learned)
    self._guidance, self._steps, self._sampler = own.guidance, own.steps, own.sampler
    self._start: Start | None = None  # the user's picture
    self._on_step: Callable | None = None
    self._scored, self._is_query = True, False
    self._denoiser()  # raises here if sizes do not fit

  def _denoiser(self):
    config = self._config
    sizes = parts.fields(config.model, 'denoiser')
    # A few layers run faster unrolled; many compile faster as a loop.
    unroll = sizes['num_layers'] if sizes['num_layers'] <= 6 else 1
    return Denoiser(
        image_size=(config.data.image_size,) * 2, **sizes, patches=config.generation.patches,
        dropout_rate=config.model.dropout_rate, attention=usable(config.model.attention),
        remat=remat_policy(config.model.remat), scan_unroll=unroll)

  @classmethod
  def check_options(cls, own):
    if own.guidance_from > own.guidance_to:
      raise UserError(f'config.generation.guidance_from={own.guidance_from}: wanted at most '
                      f'config.generation.guidance_to={own.guidance_to}')

  # ---- data

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    """Collects the maximum number of captions per picture, the words of captions, whether the
    pictures can be judged, and if so the names in them."""
    most, words, names, drawn = 0, set(), set(), None
    for example in examples:
      most = max(most, len(example.captions))
      for text in example.captions:
        words |= _words(text)
        if drawn is not False:
          wanted = parse(text)
          drawn = bool(wanted)
          names.update(judge.pairs(wanted) if wanted else ())
    return cls(config, tokenizer, {
        'max_captions': max(1, min(most, config.generation.max_captions)),
        'words': sorted(words), 'drawn': bool(drawn), 'names': sorted(names) if drawn else []})

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'captions.json'), encoding='utf-8') as f:
      return cls(config, tokenizer, json.load(f))

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'captions.json'), 'w', encoding='utf-8') as f:
      json.dump(self._learned, f, ensure_ascii=False)

  def survey(self, examples):
    examples = Sampled(examples, overview_of(examples))
    said = super().survey(examples)
    counts = lengths.caption_counts(self._tokenizer, examples, self._learned['max_captions'])
    return said + lengths.length_note(counts, 'captions', self._length,
                                      'generation.caption_length')

  @property
  def _length(self):
    return self._config.generation.caption_length

  # ---- queries

  def with_sampling(self, *, guidance: float | None = None, steps: int | None = None,
                    start: Start | None = None) -> 'Generation':
    """The same task with other sampling settings, without loss and scores.

    Args:
      guidance, steps: override the config.
      start: how sampling starts from the examples' pictures; None: from noise.
    """
    other = copy.copy(self)
    other._scored, other._start = False, start
    other._guidance = self._guidance if guidance is None else guidance
    other._steps = self._steps if steps is None else steps
    return other

  def query(self, image, text, *, n=1, guidance=None, steps=None, seed=0, mask=None, strength=None,
          progress=None):
    for name, value in (('n', n), ('steps', steps)):
      if value is not None and value < 1:
        raise UserError(f'--{name}={value}: wanted 1 or more')
    if guidance is not None and not 0 <= guidance < np.inf:
      raise UserError(f'--guidance={guidance:g}: wanted 0 (ignores the text), '
                      '1 (the text as it is) or more (stronger)')
    if strength is not None and not 0 <= strength <= 1:
      raise UserError(f'--strength={strength:g}: wanted 0 (the picture as it is) to 1 (all anew)')
    if image is None and (mask is not None or strength is not None):
      raise UserError('--mask and --strength change a picture: --image F is wanted, too')
    side = self._config.data.image_size
    start = None
    if image is not None:
      if mask is None and strength is None:
        raise UserError('--image is a picture to change: --mask F says where, or --strength 0..1 '
                        'how much')
      start = Start(1.0 if strength is None else strength,
                    None if mask is None else self._read_mask(image, mask))
    picture = np.zeros((side, side, 3), np.uint8) if image is None else image
    captions = (text.strip(),) if text.strip() else ()
    examples = [Example(picture, image_id=f'{seed}/{number}', captions=captions)
                for number in range(n)]
    task = self.with_sampling(guidance=guidance, steps=steps, start=start)
    task._is_query = True
    if progress is not None:
      task._on_step = progress(task._steps)
    return task, examples

  @property
  def batch_key(self):
    start = self._start
    # A mask is part of an example's features; it is one object for all of a query.
    return self._guidance, self._steps, start and (start.strength, id(start.mask))

  def _read_mask(self, image, mask):
    """bool [S, S]: where a mask is white, at the model's input size; transparent counts as black.
    """
    side = (self._config.data.image_size,) * 2
    picture, drawn_anew = images.decode(image, side), images.decode(mask, side, behind='black')
    if picture.size != drawn_anew.size:
      (height, width), (rows, columns) = picture.size, drawn_anew.size
      raise UserError(f'--mask{_path(mask)} is {columns}x{rows} pixels, --image{_path(image)} is '
                      f'{width}x{height}; they have to be of one size')
    fitted = np.zeros((*side, 3), np.uint8)
    Transform().apply(drawn_anew, fitted, self._config.data.keep_aspect)
    white = fitted.mean(-1) > 127
    if not white.any():
      raise UserError(f'--mask{_path(mask)} is white nowhere, so that nothing would be drawn anew: '
                      'paint white what is to change (transparent parts count as black)')
    return white

  def join(self, examples, predictions):
    pictures = np.stack([p.image for p in predictions])
    wanted = self._wanted(examples[0])
    right = None
    if wanted is not None:
      right = sum(not judge.fault(picture, wanted) for picture in pictures)
    return Drawn(pictures, right)

  def _wanted(self, example):
    """The parsed caption, for the judge; None: cannot be judged."""
    if not (self._learned['drawn'] and example.captions):
      return None
    return parse(example.captions[0])

  # ---- host: features

  def encode(self, example, placement):
    del placement
    count = self._learned['max_captions']
    captions = np.tile(self._tokenizer.encode([''], self._length), (count, 1))
    texts = example.captions[:count]
    if texts:
      captions[:len(texts)] = self._tokenizer.encode(texts, self._length)
    features = {'captions': captions, 'count': np.int32(len(texts)),
                'seed': example.seed()}
    if self._start is not None and self._start.mask is not None:
      features['mask'] = self._start.mask
    elif self._start is not None and self._is_query:  # as with a mask: one program for both
      side = self._config.data.image_size
      features['mask'] = np.ones((side, side), bool)
    return features

  def shared(self):
    if not self._is_query:
      return {}
    sampling = {'steps': np.int32(self._steps)}
    if self._guidance != 1:
      sampling['guidance'] = np.float32(self._guidance)
    # From noise a program knows that it starts at 0: its times are then rounded less often.
    if self._start is not None:
      sampling['start'] = np.float32(1.0 - self._start.strength)
    return {'sampling': sampling}

  def notes(self, example):
    if not example.captions:
      return ['no text: drawn without one']
    text, = example.captions
    notes = []
    length = int(self._tokenizer.lengths([text])[0])
    if length > self._length:
      notes.append(f'the text has {length} tokens, the model reads {self._length}: its end is left '
                   'out')
    if unknown := sorted(_words(text) - set(self._learned['words'])):
      more = f' and {len(unknown) - _SHOWN_WORDS} more' if len(unknown) > _SHOWN_WORDS else ''
      notes.append(f'words never seen in training: {", ".join(unknown[:_SHOWN_WORDS])}{more}')
    return notes

  # ---- device: model and losses

  @property
  def copies(self):
    return 1 if self._guidance == 1 else 2

  def head(self):
    own = self._config.generation
    empty = tuple(self._tokenizer.encode([''], self._length)[0].tolist())
    return GenerationHead(
        self._denoiser(), empty=empty, predicts=own.predict, time_mean=own.time_mean,
        time_std=own.time_std, early_mean=own.early_mean, early_steps=own.early_steps,
        noises=own.noises, caption_drop=own.caption_drop,
        guidance=None if self._is_query and self._guidance != 1 else float(self._guidance),
        guidance_interval=(own.guidance_from, own.guidance_to), sampler=self._sampler,
        steps=None if self._is_query else self._steps,
        strength=None if self._start is None or self._is_query else self._start.strength,
        scored=self._scored, on_step=self._on_step)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {'v': (features['count'] > 0).astype(jnp.float32)}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    return {'v': outputs}

  # ---- host: predictions

  def unfinished(self, value):
    return np.round(127.5 * (np.clip(value, -1, 1) + 1)).astype(np.uint8)

  def decode(self, arrays):
    if 'truth' not in arrays:
      return [GeneratedImage(image) for image in arrays['image']]
    return [GeneratedImage(image, truth, float(loss)) for image, truth, loss in zip(
        arrays['image'], arrays['truth'], arrays['loss'])]

  def score(self, examples, predictions):
    pairs = [(e, p) for e, p in zip(examples, predictions) if e.captions]
    if not pairs:
      return {}
    loss = float(np.mean([p.loss for _, p in pairs]))
    scores = {'loss': loss, 'main': -loss, 'examples': len(pairs)}
    judged = [(p.image, w) for e, p in pairs if (w := self._wanted(e)) is not None]
    if judged:
      faults = [judge.fault(image, wanted) for image, wanted in judged]
      scores |= judge.faithfulness(faults, [w for _, w in judged], self._learned['names'])
      scores['main'] = scores['faithfulness']
    if len(pairs) >= _LEAST_FOR_FRECHET and len(pairs[0][1].image) >= frechet.LEAST_SIDE:
      scores['frechet'] = frechet.frechet_distance(
          [p.image for _, p in pairs], [p.truth for _, p in pairs])
    return scores

  def headline(self, scores):
    if 'loss' not in scores:
      return ''
    line = f'loss {scores["loss"]:.4f} of {scores["examples"]}'
    if 'faithfulness' not in scores:
      return line
    return f'{scores["faithfulness"]:.1%} of the pictures show what their captions say, {line}'

  def table(self, scores):
    rows = []
    if 'faithfulness' in scores:
      rows.append(f'{"right pictures":<16}{"all":>8}{"seen":>8}{"unseen":>8}{"number":>8}')
      for label, name in (('one object', 'one_object'), ('two objects', 'two_objects'),
                          ('all', 'faithfulness')):
        cells = [scores.get(name + end) for end in ('', '/seen', '/unseen')]
        rows.append(f'{label:<16}' + ''.join(f'{"" if c is None else format(c, ".1%"):>8}'
                                             for c in cells)
                    + f'{scores.get(f"examples/{name}", 0):>8}')
      rows.append('seen: pairs of color and shape that occur in training; judged from pixels')
    rows.append(f'v-loss {scores["loss"]:.4f} on {scores["examples"]} pictures')
    if 'frechet' in scores:
      rows.append(f'Frechet distance of {frechet.EXTRACTOR}: {scores["frechet"]:.4f} (it is no '
                  'FID)')
    return '\n'.join(rows)

  def record(self, example, prediction):
    line = {'image_id': example.image_id, 'captions': list(example.captions),
            'loss': float(f'{prediction.loss:.6g}')}
    if (wanted := self._wanted(example)) is not None:
      line['fault'] = judge.fault(prediction.image, wanted)
    return line

  def described(self):
    side = self._config.data.image_size

    def features(inputs):
      return {'captions': inputs['caption'][:, None], 'seed': inputs['seed'],
              'mask': inputs['repaint'],
              'sampling': {name: inputs[name] for name in ('guidance', 'steps', 'start')}}

    return Described(
        query={'kind': 'drawing', 'length': self._length},
        inputs={'caption': (('b', self._length), 'int32'), 'seed': (('b',), 'int32'),
                'repaint': (('b', side, side), 'bool'), 'guidance': ((), 'float32'),
                'steps': ((), 'int32'), 'start': ((), 'float32')},
        features=features, outputs=('image',),
        answer=[{'kind': 'picture', 'key': 'png', 'array': 'image'}],
        options={
            'guidance': {'default': self._guidance, 'low': 0,
                         'help': 'How much the text counts: 1 as learned.'},
            'steps': {'default': self._steps, 'low': 1,
                      'help': 'Steps from noise to the picture.'},
            'seed': {'default': 0, 'help': 'The same seed draws the same picture.'},
            'mask': {'default': None, 'help': 'A picture of the same size, white where to draw '
                     'anew.'},
            'strength': {'default': None, 'low': 0, 'high': 1,
                         'help': 'How much of the picture is to change.'}})

  def plain(self, prediction):
    png = io.BytesIO()
    Image.fromarray(prediction.image).save(png, 'PNG')
    return {'png': base64.b64encode(png.getvalue()).decode('ascii')}

  def describe(self, prediction):
    count, height, width = prediction.images.shape[:3]
    line = f'{count} picture{"s" if count > 1 else ""} of {width}x{height} pixels'
    if prediction.right is None:
      return line
    return f'{line}, {prediction.right} of {count} show the text (judged from pixels)'

  def draw(self, example, pixels, prediction):
    if isinstance(prediction, Drawn):
      return card.tile(prediction.images)
    both = np.concatenate([prediction.image, np.full_like(pixels[:, :2], 255), pixels], axis=1)
    lines = [(text, card.PLAIN) for text in example.captions[:1]]
    if (wanted := self._wanted(example)) is not None:
      fault = judge.fault(prediction.image, wanted)
      lines.append((f'model (left): {fault or "right"}', card.WRONG if fault else card.RIGHT))
    else:
      lines.append(('left the model, right the truth', card.PLAIN))
    return card.draw_card(both, lines)


def _path(picture):
  """' PATH' of a picture in a file, '' of pixels."""
  return f' {picture}' if isinstance(picture, str) else ''


def _words(text):
  return set(_WORD.findall(text.lower()))
