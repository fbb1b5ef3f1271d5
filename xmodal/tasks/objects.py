"""Naming the object at each image token: a second task that teaches the vision tower to see.

Questions alone say little about a picture, and a model trained on them from
nothing stays at what the words of the question give away. Objects' names and
places say much: each image token tells which names' objects have their centre
in it, and which cover it. A dense, fully supervised loss on the vision tower
alone, with no matching, for data whose objects are known.
"""

import collections
import json
import os
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xmodal.data.example import Example
from xmodal.errors import UserError
from xmodal.tasks.task import Task


class Objects(Task):
  """Predicts, for each image token, the names of the objects at it."""

  name = 'objects'
  needs = ('objects',)
  loss_weights = {'centre': 1.0, 'cover': 1.0}

  def __init__(self, names: Sequence[str], *, max_objects: int):
    """A task over a fixed list of names.

    Args:
      names: the objects' names, in the order of the logits.
      max_objects: objects of one picture that count; more are left out, and said.
    """
    self.names = tuple(names)
    self._index = {name: i for i, name in enumerate(self.names)}
    self._max_objects = max_objects

  def encode(self, example, placement):
    boxes = np.zeros((self._max_objects, 4), np.float32)
    names = np.full(self._max_objects, -1, np.int32)
    known = [o for o in example.objects or () if o.name in self._index][:self._max_objects]
    if known:
      boxes[:len(known)] = placement.boxes(np.array([o.box for o in known]))
      names[:len(known)] = [self._index[o.name] for o in known]
    return {'boxes': boxes, 'names': names, 'weight': np.float32(example.objects is not None)}

  def survey(self, examples):
    known = [e for e in examples if e.objects is not None]
    if not known:
      raise UserError(f'objects: none of {len(examples)} examples has the field "objects"; take '
                      '"objects" out of config.mixer.tasks')
    if many := sum(len(e.objects) > self._max_objects for e in known):
      return [f'{many} of {len(known)} pictures have more than {self._max_objects} objects; the '
              'rest of theirs is left out: config.objects.max_objects sets the limit']
    return []

  @classmethod
  def from_data(cls, config, tokenizer, examples):
    return cls(make_name_list(examples, config.objects.max_names),
               max_objects=config.objects.max_objects)

  @classmethod
  def from_files(cls, config, tokenizer, folder):
    with open(os.path.join(folder, 'names.json'), encoding='utf-8') as f:
      return cls(json.load(f), max_objects=config.objects.max_objects)

  def save(self, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'names.json'), 'w', encoding='utf-8') as f:
      json.dump(self.names, f, ensure_ascii=False, indent=0)

  def head(self):
    return ObjectsHead(len(self.names))

  def weights(self, features):
    return {term: features['weight'] for term in self.loss_weights}

  def losses(self, outputs, features):
    grid = outputs['centre'].shape[1:3]
    targets = dict(zip(('centre', 'cover'), token_targets(
        features['boxes'], features['names'], grid, len(self.names))))
    # Summed over names and averaged over tokens: names that are absent nearly
    # everywhere must not thin the loss out.
    return {term: _binary_cross_entropy(outputs[term], targets[term]).sum(-1).mean((1, 2))
            for term in self.loss_weights}

  def decode(self, arrays):
    return [None] * len(next(iter(arrays.values())))


class ObjectsHead(nn.Module):
  """One linear layer on the vision tower's tokens."""

  num_names: int

  @nn.compact
  def __call__(self, towers, features: Mapping[str, jax.Array], *, deterministic: bool):
    """Returns logits {'centre', 'cover'}, float32 [B, rows, columns, names]."""
    del features, deterministic
    vision = towers.vision()
    logits = nn.Dense(2 * self.num_names, dtype=jnp.float32, name='names')(vision.tokens)
    logits = logits[:, logits.shape[1] - vision.grid[0] * vision.grid[1]:]  # no class token
    logits = logits.reshape(logits.shape[0], *vision.grid, 2 * self.num_names)
    centre, cover = jnp.split(logits, 2, axis=-1)
    return {'centre': centre, 'cover': cover}

  def predict(self, towers, features):
    """Returns the probability of each name being somewhere in the picture: [B, names]."""
    centre = self(towers, features, deterministic=True)['centre']
    return {'present': jax.nn.sigmoid(centre).max((1, 2))}


def token_targets(boxes: jax.Array, names: jax.Array, grid: tuple[int, int],
                  num_names: int) -> tuple[jax.Array, jax.Array]:
  """Where objects are, seen by a grid of tokens.

  Args:
    boxes: float32 [B, M, 4], (x0, y0, x1, y1) in 0..1 of the picture.
    names: int32 [B, M], -1 for none.
    grid: (rows, columns) of tokens.
    num_names: K.

  Returns:
    Two float32 [B, rows, columns, K]: 1 where the centre of an object of the
    name lies in the token; the share of the token that its box covers.
  """
  rows, columns = grid
  one_hot = jax.nn.one_hot(names, num_names)  # all zero for -1
  x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)

  def inside(low, high, cells):
    """[B, M, cells]: share of each cell between low and high, and which has the middle."""
    start = jnp.arange(cells)
    low, high = low[..., None] * cells, high[..., None] * cells
    share = jnp.clip(jnp.minimum(high, start + 1) - jnp.maximum(low, start), 0, 1)
    middle = jnp.clip(jnp.floor((low + high) / 2), 0, cells - 1)
    return share, (middle == start).astype(jnp.float32)

  share_x, middle_x = inside(x0, x1, columns)
  share_y, middle_y = inside(y0, y1, rows)
  centre = jnp.einsum('bmr,bmc,bmk->brck', middle_y, middle_x, one_hot)
  cover = jnp.einsum('bmr,bmc,bmk->brck', share_y, share_x, one_hot)
  return jnp.minimum(centre, 1), jnp.minimum(cover, 1)


def _binary_cross_entropy(logits, targets):
  return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def make_name_list(examples: Sequence[Example], size: int) -> tuple[str, ...]:
  """The objects' names met most often, commonest first.

  Raises:
    UserError: no example has an object.
  """
  counts = collections.Counter(o.name for e in examples for o in e.objects or ())
  if not counts:
    raise UserError(f'objects: none of {len(examples)} training examples has an object; take '
                    '"objects" out of config.mixer.tasks')
  ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return tuple(name for name, _ in ranked[:size])


TASK = Objects
