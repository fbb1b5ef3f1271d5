"""Names of the objects at each image token: an auxiliary task that grounds words in pictures.

Questions alone give little supervision about a picture: a model trained on them from
scratch learns only what the words of the question reveal. Names and places of objects
give much more. For each image token, the task predicts the names of the objects
whose centre is in it. A token's logit is its match with the text tower's embedding of
the name, in the space where the cross-modal layers compare the two, so that a
question's words attend to the objects that they name.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

from xmodal.data.example import Example
from xmodal.data.faults import count_kinds
from xmodal.data.overview import overview_of
from xmodal.data.pictures.placement import visible_objects
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models.names import Names, names_present, pad_names, sample_names
from xmodal.options import Option
from xmodal.tasks import imitation
from xmodal.tasks.described import Described
from xmodal.tasks.drawing import card
from xmodal.tasks.task import TASKS, Task

_TOP = 10
_LIKELY = 0.5  # probability from which a name counts as predicted

OPTIONS = {
    'max_names': Option(200, 'Maximum number of names; the most frequent are kept.', low=1),
    'sampled_names': Option(256, 'Maximum number of names per training step, see '
                            'detection.sampled_names.',
                            low=1),
    'max_objects': Option(16, 'Maximum number of objects per picture in training.', low=1)}


@dataclasses.dataclass(frozen=True)
class NamedObjects:
  """Names of the things in a picture.

  Attributes:
    names: up to ten (name, probability 0..1 that one is there), most probable first.
  """

  names: tuple[tuple[str, float], ...]


@TASKS.register('objects', options=OPTIONS)
class Objects(Task):
  """Predicts the names of the objects at each image token."""

  name = 'objects'
  needs = ('objects',)
  loss_weights = {'names': 1.0}
  main_score = 'f1'

  def __init__(self, tokenizer: Tokenizer, names: Sequence[str], *, max_objects: int,
               sampled_names: int = 256):
    """Creates the task for a fixed list of names.

    Args:
      tokenizer: tokenizer of the names.
      names: the objects' names, in the order of the logits.
      max_objects: maximum number of objects per picture; `survey` reports any excess.
      sampled_names: names per training step, see models.names.sample_names.
    """
    self.names, self._pad_id = tuple(names), tokenizer.pad_id
    self._name_tokens = tokenizer.encode(self.names, int(tokenizer.lengths(self.names).max()))
    self._index = {name: i for i, name in enumerate(self.names)}
    self._max_objects, self._sampled_names = max_objects, sampled_names

  def encode(self, example, placement):
    boxes = np.zeros((self._max_objects, 4), np.float32)
    names = np.full(self._max_objects, -1, np.int32)
    known = [o for o in example.objects or () if o.name in self._index]
    visible, visible_boxes = visible_objects(known, placement)
    count = min(len(visible), self._max_objects)
    boxes[:count] = visible_boxes[:count]
    names[:count] = [self._index[o.name] for o in visible[:count]]
    return {'boxes': boxes, 'names': names, 'weight': np.float32(example.objects is not None)}

  def survey(self, examples):
    said = super().survey(examples)
    counts = overview_of(examples).num_objects
    if many := sum(times for number, times in counts.items() if number > self._max_objects):
      said.append(f'{many} of {counts.total()} pictures have more than {self._max_objects} '
                  'objects; the rest of theirs is left out: config.objects.max_objects sets the '
                  'limit')
    return said

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    return cls(tokenizer, make_name_list(examples, config.objects.max_names),
               max_objects=config.objects.max_objects,
               sampled_names=config.objects.sampled_names)

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'names.json'), encoding='utf-8') as f:
      return cls(tokenizer, json.load(f), max_objects=config.objects.max_objects,
                 sampled_names=config.objects.sampled_names)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'names.json'), 'w', encoding='utf-8') as f:
      json.dump(self.names, f, ensure_ascii=False, indent=0)

  def vocabulary(self):
    return Names(self._name_tokens)

  def sampled_vocabulary(self, features, key):
    names = self.vocabulary()
    present = names_present(features['names'], len(names.tokens))
    return sample_names(names, present, self._sampled_names, key)

  def head(self):
    return ObjectsHead()

  def weights(self, features) -> dict[str, Float[Array, '*B']]:
    return {term: features['weight'] for term in self.loss_weights}

  def losses(self, outputs, features) -> dict[str, Float[Array, ' B']]:
    targets = token_targets(features['boxes'], features['names'], outputs.shape[1:3],
                            len(self.names))
    is_picture = ~jnp.isneginf(outputs[..., :1])
    losses = optax.sigmoid_binary_cross_entropy(jnp.where(is_picture, outputs, 0), targets)
    # Exclude names that this step does not sample.
    if 'vocabulary' in features and features['vocabulary'].counts is not None:
      losses = jnp.where(features['vocabulary'].counts, losses, 0)
    # Summed over names and averaged over tokens: a mean over names, most of which are absent,
    # would dilute the loss.
    return {'names': losses.sum(-1).mean((1, 2), where=is_picture[..., 0])}

  def imitation(self, outputs, taught, features) -> dict[str, Float[Array, ' B']]:
    if outputs.shape != taught.shape:
      return {}  # another grid of tokens
    is_picture = ~jnp.isneginf(outputs[..., :1]) & ~jnp.isneginf(taught[..., :1])
    losses = imitation.binary_divergence(jnp.where(is_picture, outputs, 0),
                                         jnp.where(is_picture, taught, 0))
    return {'names': losses.sum(-1).mean((1, 2), where=is_picture[..., 0])}

  def decode(self, arrays):
    """Returns NamedObjects for each picture."""
    present = arrays['present'][:, :len(self.names)]  # without padding rows
    ranked = np.argsort(-present, axis=-1, kind='stable')[:, :_TOP]
    return [NamedObjects(tuple((self.names[i], float(row[i])) for i in order))
            for row, order in zip(present, ranked)]

  def score(self, examples, predictions):
    """Micro-averaged precision, recall and F1 of the predicted names.

    If no picture has an object, recall is undefined and there is no score.
    """
    pairs = [({o.name for o in e.objects}, {name for name, chance in found.names
                                               if chance >= _LIKELY})
             for e, found in zip(examples, predictions) if e.objects is not None]
    if not pairs:
      return {}
    positives, predicted, right = (sum(map(len, sets)) for sets in (
        *zip(*pairs), [truth & named for truth, named in pairs]))
    if not positives:
      return {'examples': len(pairs)}
    return {'f1': 2 * right / (positives + predicted), 'precision': right / max(predicted, 1),
            'recall': right / positives, 'examples': len(pairs)}

  def headline(self, scores):
    return f'F1 of names {scores["f1"]:.1%}' if 'f1' in scores else ''

  def described(self):
    names = pad_names(self.vocabulary(), self._pad_id)
    return Described(
        query={'kind': 'picture'}, inputs={}, features=lambda inputs: {'vocabulary': names},
        outputs=('present',),
        answer=[{'kind': 'ranked', 'key': 'names', 'array': 'present', 'labels': list(self.names),
                 'most': _TOP, 'decimals': 6}])

  def plain(self, prediction):
    return {'names': [{'name': name, 'probability': round(probability, 6)}
                      for name, probability in prediction.names]}

  def record(self, example, prediction):
    if example.objects is None:
      return None
    return {'objects': sorted({o.name for o in example.objects})} | self.plain(prediction)

  def describe(self, prediction):
    return '\n'.join(f'{probability:7.1%}  {name}' for name, probability in prediction.names)

  def notes(self, example):
    return ['objects reads no text: --text is not used'] if example.question else []

  def draw(self, example, pixels, prediction):
    truth = {o.name for o in example.objects or ()}
    lines = [(f'{name} ({probability:.0%})',
              card.PLAIN if not truth else card.RIGHT if name in truth else card.WRONG)
             for name, probability in prediction.names if probability >= _LIKELY]
    lines = lines or [('nothing likely', card.PLAIN if not truth else card.WRONG)]
    if example.objects is not None:
      lines.append((f'truth: {", ".join(sorted(truth)) or "nothing"}', card.PLAIN))
    return card.draw_card(card.shown(example, pixels), lines)


class ObjectsHead(nn.Module):
  """Matches image tokens with names; parameters: only a scale and a bias (arXiv:2303.15343)."""

  @nn.compact
  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> Float[Array, 'B rows columns K']:
    """Returns logits, float32 [B, rows, columns, K]; -inf in a picture's padding."""
    vision, names = towers.vision(), towers.names(features['vocabulary'])
    tokens = towers.align_vision(vision)
    rows, columns = vision.grid
    tokens = tokens[:, tokens.shape[1] - rows * columns:]  # no class token
    scale = self.param('log_scale', nn.initializers.zeros, ())
    # Start with low probabilities: most names are absent at most tokens.
    bias = self.param('score_bias', nn.initializers.constant(-4.0), ())
    logits = jnp.einsum('bnd,kd->bnk', tokens, names, preferred_element_type=jnp.float32)
    logits = logits * (jnp.exp(scale) * tokens.shape[-1] ** -0.5) + bias
    if vision.mask is not None:
      logits = jnp.where(vision.mask[:, -rows * columns:, None], logits, -jnp.inf)
    return logits.reshape(-1, rows, columns, len(names))

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the probability that each name is anywhere in the picture: [B, K]."""
    return {'present': jax.nn.sigmoid(self(towers, features, deterministic=True)).max((1, 2))}


def token_targets(boxes: Float[Array, 'B M 4'], names: Int[Array, 'B M'], grid: tuple[int, int],
                  num_names: int) -> Float[Array, 'B {grid[0]} {grid[1]} {num_names}']:
  """Targets of the grid's tokens: the names of the objects whose centre is in a token.

  Args:
    boxes: float32 [B, M, 4], (x0, y0, x1, y1) in 0..1 of the picture.
    names: int32 [B, M], -1 for no object.
    grid: (rows, columns) of tokens.
    num_names: K.

  Returns:
    float32 [B, rows, columns, K]: 1 where an object of the name has its centre.
  """
  def middle(low, high, cells):
    cell = jnp.clip(jnp.floor((low + high) / 2 * cells), 0, cells - 1)
    return jax.nn.one_hot(cell.astype(jnp.int32), cells)

  x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)
  # The one-hot row of a padded object (-1) is all zeros.
  counts = jnp.einsum('bmr,bmc,bmk->brck', middle(y0, y1, grid[0]), middle(x0, x1, grid[1]),
                      jax.nn.one_hot(names, num_names))
  return jnp.minimum(counts, 1)


def make_name_list(examples: Sequence[Example], size: int) -> tuple[str, ...]:
  """The `size` most frequent names of objects, by decreasing frequency.

  Raises:
    UserError: no example has an object.
  """
  counts = overview_of(examples).names
  if not counts:
    faults = count_kinds(getattr(examples, 'faults', ()))
    raise UserError(f'none of {len(examples)} training examples has an object'
                    f'{f" ({faults})" if faults else ""}: add "objects" to '
                    'the data, or take the tasks that learn from them (objects, detection) out of '
                    'config.mixer.tasks')
  ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return tuple(name for name, _ in ranked[:size])
