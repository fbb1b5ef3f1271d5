"""Captioning: the T5 decoder generates a description of a picture."""

from collections.abc import Callable, Mapping
import copy
import dataclasses
import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from xmodal.data.example import Example
from xmodal.data.overview import Sampled, overview_of
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.metrics import captioning as metrics
from xmodal.options import Option
from xmodal.tasks import imitation, lengths, writing
from xmodal.tasks.described import WRITTEN, Described, written_field
from xmodal.tasks.drawing import card
from xmodal.tasks.task import TASKS, Task

OPTIONS = {
    'caption_length': Option(32, 'Tokens of a caption.', low=2),
    'max_captions': Option(5, 'Maximum number of captions per picture in training.', low=1),
    'beams': Option(1, 'Beams of the search; 1: greedy.', low=1, may_change=True),
    'temperature': Option(0.0, 'Above 0: tokens are sampled at this temperature.', low=0,
                          may_change=True),
    'top_k': Option(0, 'Sample from the k most probable tokens; 0: from all.', low=0,
                    may_change=True),
    'top_p': Option(1.0, 'Sample from the fewest tokens of this total probability; 1: from all.',
                    low=0, high=1, may_change=True)}


@dataclasses.dataclass(frozen=True)
class Caption:
  """A caption.

  Attributes:
    caption: the text.
    probability: 0..1, under the model: the product over its tokens.
  """

  caption: str
  probability: float


@TASKS.register('captioning', options=OPTIONS)
class Captioning(Task):
  """Describes pictures.

  The per-example loss is the mean over its captions of the cross-entropy per token.
  Each training step uses all captions of a picture (up to
  config.captioning.max_captions), and the vision tower runs once for them.
  """

  name = 'captioning'
  needs = ('captions',)
  loss_weights = {'gen': 1.0}
  main_score = 'CIDEr'

  def __init__(self, config, tokenizer: Tokenizer, max_captions: int, seed: int = 0):
    """Creates the task.

    Args:
      config: config.captioning.
      tokenizer: tokenizer of captions.
      max_captions: captions per picture used in training.
      seed: seed of sampled captions.
    """
    if config.temperature and config.beams > 1:
      raise UserError(f'config.captioning.beams={config.beams} searches and '
                      f'config.captioning.temperature={config.temperature} draws at random; set '
                      'the first to 1 or the second to 0')
    self._config, self._tokenizer = config, tokenizer
    self._max_captions, self._seed = max_captions, seed
    self._on_step: Callable | None = None

  # ---- what is learned from the data

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    most = int(overview_of(examples).num_captions.max(initial=0))
    return cls(config.captioning, tokenizer, max(1, min(most, config.captioning.max_captions)),
               config.seed)

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'captions.json'), encoding='utf-8') as f:
      return cls(config.captioning, tokenizer, json.load(f)['max_captions'], config.seed)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'captions.json'), 'w', encoding='utf-8') as f:
      json.dump({'max_captions': self._max_captions}, f)

  def survey(self, examples):
    examples = Sampled(examples, overview_of(examples))
    said = super().survey(examples)
    said += lengths.length_note(
        lengths.caption_counts(self._tokenizer, examples), 'captions',
        self._config.caption_length, 'captioning.caption_length')
    counts = examples.overview.num_captions
    if many := int((counts > self._max_captions).sum()):
      said.append(f'{many} of {len(examples)} pictures have more than {self._max_captions} '
                  f'captions (up to {counts.max()}); training reads the first of them: '
                  'config.captioning.max_captions sets the limit')
    return said

  # ---- host: features

  def encode(self, example, placement):
    del placement
    captions = np.full((self._max_captions, self._config.caption_length), self._tokenizer.pad_id,
                       np.int32)
    texts = example.captions[:self._max_captions]
    if texts:
      captions[:len(texts)] = self._tokenizer.encode(texts, self._config.caption_length)
    features = {'captions': captions, 'weight': np.float32(bool(texts))}
    if self._config.temperature:
      features['seed'] = example.seed()
    return features

  @property
  def query_options(self):
    return ('progress',) if self._config.beams == 1 else ()

  def query(self, image, text, *, progress=None):
    if progress is None:
      return super().query(image, text)
    task = copy.copy(self)
    task._on_step = progress(self._config.caption_length)
    return task, [Example(image, question=text)]

  def unfinished(self, value):
    return self._tokenizer.decode(value)

  def notes(self, example):
    return ['captioning reads no text: --text is not used'] if example.question else []

  # ---- device: model and losses

  @property
  def copies(self):
    return self._config.beams

  def head(self):
    own = self._config
    return CaptioningHead(
        caption_length=own.caption_length, pad_id=self._tokenizer.pad_id,
        eos_id=self._tokenizer.eos_id, beams=own.beams, temperature=own.temperature,
        top_k=own.top_k, top_p=own.top_p, seed=self._seed, on_step=self._on_step)

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {'gen': features['weight']}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    pad_id, captions = self._tokenizer.pad_id, features['captions']
    caption_losses = jax.vmap(lambda logits, tokens: writing.token_loss(logits, tokens, pad_id),
                              in_axes=1, out_axes=1)(outputs, captions)
    count = (captions != pad_id).any(-1).sum(-1)
    return {'gen': caption_losses.sum(-1) / jnp.maximum(count, 1)}

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    losses = imitation.divergence_of_text(outputs, taught, features['captions'],
                                          self._tokenizer.pad_id)
    count = (features['captions'] != self._tokenizer.pad_id).any(-1).sum(-1)
    return {'gen': losses.sum(-1) / jnp.maximum(count, 1)}

  def progress(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    """Accuracy of the captions' tokens."""
    tokens = features['captions']
    is_text = tokens != self._tokenizer.pad_id
    right = (outputs.argmax(-1) == tokens) & is_text
    return {'accuracy': right.sum((1, 2)) / jnp.maximum(is_text.sum((1, 2)), 1)}

  # ---- host: predictions

  def decode(self, arrays):
    return [Caption(*pair) for pair in writing.read_texts(self._tokenizer, arrays)]

  def score(self, examples, predictions):
    pairs = [(e, p) for e, p in zip(examples, predictions) if e.captions]
    if not pairs:
      return {}
    scores = metrics.caption_scores([p.caption for _, p in pairs], [e.captions for e, _ in pairs])
    return scores | {'examples': len(pairs)}

  def headline(self, scores):
    if 'CIDEr' not in scores:
      return ''
    return (f'CIDEr {scores["CIDEr"]:.2f}, BLEU-4 {scores["BLEU-4"]:.1%}, '
            f'{scores["exact"]:.1%} of {scores["examples"]} word for word')

  def table(self, scores):
    rows = [f'{"captions":<10}{scores["examples"]:>8}']
    for name, score in scores.items():
      if name != 'examples':
        rows.append(f'{name:<10}{score:>8.3f}' if name == 'CIDEr' else f'{name:<10}{score:>8.1%}')
    return '\n'.join(rows)

  def record(self, example, prediction):
    return {'image_id': example.image_id, **self.plain(prediction),
            'captions': list(example.captions)}

  def described(self):
    return Described(
        query={'kind': 'picture'},
        inputs={'seed': (('b',), 'int32')} if self._config.temperature else {}, features=dict,
        outputs=WRITTEN, answer=[written_field('caption', digits=6)])

  def plain(self, prediction):
    return {'caption': prediction.caption,
            'probability': float(f'{prediction.probability:.6g}')}

  def files(self, examples, predictions):
    """COCO's results file, with one caption per image id."""
    captions = {e.image_id: p.caption for e, p in zip(examples, predictions)
                if e.image_id is not None}
    return {'results': [{'image_id': image_id, 'caption': caption}
                        for image_id, caption in captions.items()]} if captions else {}

  def describe(self, prediction):
    return f'{prediction.caption} ({prediction.probability:.1%})'

  def draw(self, example, pixels, prediction):
    known = [metrics.tokenize(text) for text in example.captions]
    # A caption in other words may be as correct, so it is not marked wrong.
    colour = card.RIGHT if metrics.tokenize(prediction.caption) in known else card.PLAIN
    lines = [(f'model: {self.describe(prediction)}', colour)]
    lines += [(f'truth: {text}', card.PLAIN) for text in example.captions[:1]]
    return card.draw_card(card.shown(example, pixels), lines)


class CaptioningHead(nn.Module):
  """The decoder on a picture fused with an empty text; has no parameters of its own.

  Attributes:
    caption_length: maximum length of a caption, in tokens.
    pad_id, eos_id: token ids.
    beams: beams of the search; 1: no search.
    temperature, top_k, top_p: of sampling; temperature 0: no sampling.
    seed: seed of sampling, combined with each picture's seed.
    on_step: see models.generate.
  """

  caption_length: int
  pad_id: int
  eos_id: int
  beams: int = 1
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  on_step: Callable | None = None

  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> Float[Array, 'B N T V']:
    """Returns logits, float32 [B, N, T, V], of N captions per picture."""
    del deterministic
    captions = features['captions']
    batch, number, length = captions.shape
    # All captions share the same fused tokens.
    fused = self._fused(towers).repeat(number)
    logits = writing.teacher_forced_logits(towers, fused, captions.reshape(-1, length), self.pad_id)
    return logits.reshape(batch, number, length, -1)

  def _fused(self, towers):
    vision = towers.vision().tokens
    return towers.fused(jnp.full((vision.shape[0], 1), self.pad_id, jnp.int32))

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Returns one caption per picture, see writing.write."""
    sampling = {}
    if self.temperature:
      # Per-picture keys, so that a caption does not depend on the other pictures of the batch.
      rng = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), features['seed'])
      sampling = dict(rng=rng, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
    return writing.write(towers, self._fused(towers), self.caption_length, pad_id=self.pad_id,
                         eos_id=self.eos_id, beams=self.beams, on_step=self.on_step, **sampling)
