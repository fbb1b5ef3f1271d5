"""Naming the object at each image token: a second task that teaches towers what words look like.

Questions alone say little about a picture, and a model trained on them from
nothing stays at what the words of the question give away. Objects' names and
places say much: each image token tells which names' objects have their centre
in it. A token is scored by how well it matches the text tower's embedding of
the name, in the space in which the cross-modal layers compare the two, so that
a question's words find what they speak of.
"""

import collections
from collections.abc import Mapping, Sequence
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from xmodal.data.example import Example
from xmodal.data.faults import count_kinds
from xmodal.data.pictures.placement import visible_objects
from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models.names import Names, names_present, sample_names
from xmodal.options import Option
from xmodal.tasks.drawing import card
from xmodal.tasks.task import TASKS, Task

_TOP = 10
_LIKELY = 0.5  # a name's probability, from which it counts as said

OPTIONS = {
    'max_names': Option(200, 'Most names that are learned; the commonest are kept.', low=1),
    'sampled_names': Option(256, 'Most names in a training step, see detection.sampled_names.', low=1),
    'max_objects': Option(16, 'Most objects of a picture in training.', low=1)}


@TASKS.register('objects', options=OPTIONS)
class Objects(Task):
  """Predicts, for each image token, the names of the objects at it."""

  name = 'objects'
  needs = ('objects',)
  loss_weights = {'names': 1.0}
  main_score = 'f1'

  def __init__(self, tokenizer: Tokenizer, names: Sequence[str], *, max_objects: int,
               sampled_names: int = 256):
    """A task over a fixed list of names.

    Args:
      tokenizer: of the names.
      names: the objects' names, in the order of the logits.
      max_objects: objects of one picture that count; more are left out, and said.
      sampled_names: that a training step looks for, see models.names.sample_names.
    """
    self.names = tuple(names)
    self._name_tokens = tokenizer.encode(self.names, int(tokenizer.lengths(self.names).max()))
    self._index = {name: i for i, name in enumerate(self.names)}
    self._max_objects, self._sampled_names = max_objects, sampled_names

  def encode(self, example, placement):
    boxes = np.zeros((self._max_objects, 4), np.float32)
    names = np.full(self._max_objects, -1, np.int32)
    known = [o for o in example.objects or () if o.name in self._index]
    seen, their_boxes = visible_objects(known, placement)
    count = min(len(seen), self._max_objects)
    boxes[:count] = their_boxes[:count]
    names[:count] = [self._index[o.name] for o in seen[:count]]
    return {'boxes': boxes, 'names': names, 'weight': np.float32(example.objects is not None)}

  def survey(self, examples):
    said = super().survey(examples)
    known = [e for e in examples if e.objects is not None]
    if many := sum(len(e.objects) > self._max_objects for e in known):
      said.append(f'{many} of {len(known)} pictures have more than {self._max_objects} objects; '
                  'the rest of theirs is left out: config.objects.max_objects sets the limit')
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

  def weights(self, features):
    return {term: features['weight'] for term in self.loss_weights}

  def losses(self, outputs, features):
    targets = token_targets(features['boxes'], features['names'], outputs.shape[1:3],
                            len(self.names))
    is_picture = ~jnp.isneginf(outputs[..., :1])
    losses = optax.sigmoid_binary_cross_entropy(jnp.where(is_picture, outputs, 0), targets)
    # Names that are left out of a step do not count.
    if 'vocabulary' in features and features['vocabulary'].counts is not None:
      losses = jnp.where(features['vocabulary'].counts, losses, 0)
    # Summed over names and averaged over tokens: names that are absent nearly
    # everywhere must not thin the loss out.
    return {'names': losses.sum(-1).mean((1, 2), where=is_picture[..., 0])}

  def decode(self, arrays):
    """Of each picture up to ten (name, probability 0..1 that it is there), likeliest first."""
    present = arrays['present'][:, :len(self.names)]  # not of rows that fill the names up
    ranked = np.argsort(-present, axis=-1, kind='stable')[:, :_TOP]
    return [tuple((self.names[i], float(row[i])) for i in order)
            for row, order in zip(present, ranked)]

  def score(self, examples, predictions):
    """Precision, recall and F1 of the names said, over all pictures at once (micro).

    Where no picture has an object there is nothing to recall, and so no score.
    """
    pairs = [({o.name for o in e.objects}, {name for name, chance in said if chance >= _LIKELY})
             for e, said in zip(examples, predictions) if e.objects is not None]
    if not pairs:
      return {}
    there, told, right = (sum(map(len, sets)) for sets in (
        *zip(*pairs), [truth & said for truth, said in pairs]))
    if not there:
      return {'examples': len(pairs)}
    return {'f1': 2 * right / (there + told), 'precision': right / max(told, 1),
            'recall': right / there, 'examples': len(pairs)}

  def headline(self, scores):
    return f'F1 of names {scores["f1"]:.1%}' if 'f1' in scores else ''

  def plain(self, prediction):
    return {'names': [{'name': name, 'probability': round(probability, 6)}
                      for name, probability in prediction]}

  def describe(self, prediction):
    return '\n'.join(f'{probability:7.1%}  {name}' for name, probability in prediction)

  def draw(self, example, pixels, prediction):
    truth = {o.name for o in example.objects or ()}
    lines = [(f'{name} ({probability:.0%})',
              card.PLAIN if not truth else card.RIGHT if name in truth else card.WRONG)
             for name, probability in prediction if probability >= _LIKELY]
    lines = lines or [('nothing likely', card.PLAIN if not truth else card.WRONG)]
    if example.objects is not None:
      lines.append((f'truth: {", ".join(sorted(truth)) or "nothing"}', card.PLAIN))
    return card.draw_card(pixels, lines)


class ObjectsHead(nn.Module):
  """Matches image tokens with names; its own parameters are a scale and a bias (arXiv:2303.15343).
  """

  @nn.compact
  def __call__(self, towers, features: Mapping[str, jax.Array], *, deterministic: bool):
    """Returns logits, float32 [B, rows, columns, K]; -inf in the padding of a picture."""
    vision, names = towers.vision(), towers.names(features['vocabulary'])
    seen = towers.seen(vision)
    rows, columns = vision.grid
    seen = seen[:, seen.shape[1] - rows * columns:]  # no class token
    scale = self.param('log_scale', nn.initializers.zeros, ())
    # Most names are absent at most tokens: begin there.
    bias = self.param('score_bias', nn.initializers.constant(-4.0), ())
    logits = jnp.einsum('bnd,kd->bnk', seen, names, preferred_element_type=jnp.float32)
    logits = logits * (jnp.exp(scale) * seen.shape[-1] ** -0.5) + bias
    if vision.mask is not None:
      logits = jnp.where(vision.mask[:, -rows * columns:, None], logits, -jnp.inf)
    return logits.reshape(-1, rows, columns, len(names))

  def predict(self, towers, features):
    """Returns the probability of each name being somewhere in the picture: [B, K]."""
    return {'present': jax.nn.sigmoid(self(towers, features, deterministic=True)).max((1, 2))}


def token_targets(boxes: jax.Array, names: jax.Array, grid: tuple[int, int],
                  num_names: int) -> jax.Array:
  """In which token of a grid each object's centre lies.

  Args:
    boxes: float32 [B, M, 4], (x0, y0, x1, y1) in 0..1 of the picture.
    names: int32 [B, M], -1 for none.
    grid: (rows, columns) of tokens.
    num_names: K.

  Returns:
    float32 [B, rows, columns, K]: 1 where an object of the name has its centre.
  """
  def middle(low, high, cells):
    cell = jnp.clip(jnp.floor((low + high) / 2 * cells), 0, cells - 1)
    return jax.nn.one_hot(cell.astype(jnp.int32), cells)

  x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)
  # An object without a name (-1) is all zeros in its one-hot row.
  counts = jnp.einsum('bmr,bmc,bmk->brck', middle(y0, y1, grid[0]), middle(x0, x1, grid[1]),
                      jax.nn.one_hot(names, num_names))
  return jnp.minimum(counts, 1)


def make_name_list(examples: Sequence[Example], size: int) -> tuple[str, ...]:
  """The objects' names met most often, commonest first.

  Raises:
    UserError: no example has an object.
  """
  counts = collections.Counter(o.name for e in examples for o in e.objects or ())
  if not counts:
    faults = count_kinds(getattr(examples, 'faults', ()))
    raise UserError(f'none of {len(examples)} training examples has an object'
                    f'{f" ({faults})" if faults else ""}: add "objects" to '
                    'the data, or take the tasks that learn from them (objects, detection) out of '
                    'config.mixer.tasks')
  ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return tuple(name for name, _ in ranked[:size])
