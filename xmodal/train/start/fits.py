"""Fits a parameter of one model to another: by labels, positions or layers."""

from collections.abc import Callable, Hashable, Mapping
import dataclasses
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xmodal.data.tokenizer import Tokenizer
from xmodal.errors import UserError
from xmodal.models.towers.vit import ViT
from xmodal.pretrained.positions import cubic_weights, resize_positions
from xmodal.tasks.task import Task

# Token axis of a parameter, by the end of its path.
_TOKENS = {'token_embedding/embedding': 0, 'lm_head/kernel': 1}
_PAD, _END = ('pad',), ('end',)  # labels of special tokens, independent of their text


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """The parts of a model that give its parameters their meaning.

  Attributes:
    vision: the vision tower.
    tokenizer: the tokenizer of its texts.
    tasks: by name.
  """

  vision: nn.Module
  tokenizer: Tokenizer
  tasks: Mapping[str, Task]

  def labels(self, path: str) -> tuple[int, str, dict[Hashable, int]] | None:
    """A parameter's labelled axis: (axis, kind of label, {label: index}); None if it has none."""
    for end, axis in _TOKENS.items():
      if path.endswith(f'_tower/{end}'):
        special = {self.tokenizer.pad_id: _PAD, self.tokenizer.eos_id: _END}
        return axis, 'tokens', {special.get(number, token): number
                                for token, number in self.tokenizer.vocabulary.items()}
    for name, task in self.tasks.items():
      for layer, labels in task.labels().items():
        if path in (f'heads_{name}/{layer}/kernel', f'heads_{name}/{layer}/bias'):
          return -1, layer, {label: place for place, label in enumerate(labels)}
    return None


def counts_tokens(path: str) -> bool:
  """Whether a parameter has an axis of tokens."""
  return any(path.endswith(f'_tower/{end}') for end in _TOKENS)


@dataclasses.dataclass(frozen=True)
class Fit:
  """How to make a parameter from that of another model.

  Attributes:
    how: description for the user; '' for a plain copy.
    make: (initial value in the new model, the other model's value) -> value; traced.
    is_whole: whether `make` runs in numpy on the full array on every host, and ignores the
      initial value.
  """

  how: str = ''
  make: Callable[[jax.Array, jax.Array], jax.Array] = lambda new, old: old
  is_whole: bool = False


def fit(path: str, old_shape: tuple[int, ...], shape: tuple[int, ...], old: ModelSpec,
        new: ModelSpec) -> Fit | None:
  """How to make a parameter of this path and shape from that of another model; None if impossible.

  Args:
    path: such as 'backbone/vision_tower/position_embedding'.
    old_shape: shape in the other model.
    shape: shape in the new model.
    old, new: specs of both models.
  """
  if (axis := new.labels(path)) and (known := old.labels(path)):
    return _by_labels(old_shape, shape, known[2], *axis)
  if path == 'backbone/vision_tower/position_embedding' and (
      isinstance(old.vision, ViT) and isinstance(new.vision, ViT)):
    return _of_places(old_shape, shape, old.vision, new.vision)
  if old_shape == shape:
    return Fit()
  if path.endswith(('row_embedding', 'column_embedding')) and old_shape[1:] == shape[1:]:
    weights = cubic_weights(old_shape[0], shape[0])
    return Fit(f'{old_shape[0]} positions resized to {shape[0]}',
               lambda _, table: weights @ table, is_whole=True)
  if re.search(r'(^|/)\w*layers/', path) and old_shape[1:] == shape[1:] and shape:
    count = min(old_shape[0], shape[0])
    rest = (f', {shape[0] - count} new after' if count < shape[0] else
            f' of {old_shape[0]} taken')
    return Fit(f'the first {count} layer{"s"[:count > 1]}{rest}',
               lambda value, stack: value.at[:count].set(stack[:count]))
  return None


def _by_labels(old_shape, shape, known, axis, what, wanted):
  """Copies rows or columns with the same label."""
  axis %= len(shape)
  if len(old_shape) != len(shape) or any(
      a != b for i, (a, b) in enumerate(zip(old_shape, shape)) if i != axis):
    return None
  if wanted == known and old_shape == shape:
    return Fit()
  places = [(place, known[label]) for label, place in wanted.items() if label in known]
  if not places:
    return None
  to, origin = np.array(sorted(places), np.int32).T

  def make(value, other):
    at = (slice(None),) * axis + (to,)
    return value.at[at].set(jnp.take(other, origin, axis=axis))

  return Fit(f'{len(to)} of {len(wanted)} {what} found', make)


def _of_places(old_shape, shape, source, module):
  """Resizes position embeddings of a patch grid, as for pretrained towers."""
  grids = [tuple(side // vit.patch_size for side in vit.image_size) for vit in (source, module)]
  if old_shape == shape and grids[0] == grids[1]:
    return Fit()
  # Antialiased only for DINOv2 with registers.
  resize = resize_positions(source, module, antialias=source.num_registers > 0)
  try:
    resize(np.zeros(old_shape, np.float32), shape)
  except UserError:
    return None
  (rows, columns), (new_rows, new_columns) = grids
  return Fit(f'{rows} x {columns} positions resized to {new_rows} x {new_columns}',
             lambda _, table: resize(table, shape), is_whole=True)
