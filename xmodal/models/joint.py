"""The shared model: a vision tower, a text tower, and the layers that join them."""

from collections.abc import Mapping, Sequence
import dataclasses

from flax import linen as nn
from flax.core import FrozenDict
import jax
import jax.numpy as jnp

from xmodal.models.attention import IMPLEMENTATIONS
from xmodal.models.layers import REMAT
from xmodal.models.layout import split_rows, whole
from xmodal.models.lora import Lora, adapters
from xmodal.models.names import Names
from xmodal.models.padding import Padding
from xmodal.models.parts import SIZES
from xmodal.models.stream import Stream, concatenate
from xmodal.models.towers.t5 import start_writing
from xmodal.options import Option

OPTIONS = {
    'size': Option('tiny', 'Preset that fills in what the parts of the model leave open.',
                   choices=SIZES),
    'dtype': Option('auto', 'Of the computation; auto: bfloat16 on accelerators, float32 on CPU.',
                    choices=('auto', 'float32', 'bfloat16'), may_change=True),
    'attention': Option('xla', 'Kernel of attention; cudnn: NVIDIA, bfloat16, no dropout.',
                        choices=IMPLEMENTATIONS, may_change=True),
    'remat': Option('none', 'full: recompute layers in the backward pass; dots: keep matrix '
                    'products.', choices=REMAT, may_change=True),
    'dropout_rate': Option(0.0, 'Of all layers.', low=0, high=0.99)}


@dataclasses.dataclass(frozen=True)
class Fused:
  """Picture and text after the cross-modal layers.

  Attributes:
    vision, text: [B, N, D] and [B, L, D].
    mask: bool [B, L] of the text.
    pooled: [B, D], one vector for both.
    grid: (rows, columns) on which the last tokens of the picture lie.
    vision_mask: bool [B, N] of the picture; None: it has no padding.
  """

  vision: jax.Array
  text: jax.Array
  mask: jax.Array
  pooled: jax.Array
  grid: tuple[int, int]
  vision_mask: jax.Array | None = None

  @property
  def tokens(self) -> tuple[jax.Array, jax.Array]:
    """Both streams in one, [B, N + L, D], and its mask, bool [B, N + L]."""
    both = concatenate(Stream(self.vision, self.vision_mask), Stream(self.text, self.mask))
    return both.tokens, both.mask

  def repeat(self, number: int) -> 'Fused':
    """Each row `number` times, one after the other."""
    if number == 1:
      return self
    return dataclasses.replace(self, **{
        name: jnp.repeat(getattr(self, name), number, axis=0)
        for name in ('vision', 'text', 'mask', 'pooled', 'vision_mask')
        if getattr(self, name) is not None})


class SumPool(nn.Module):
  """Both streams summed over their tokens, each through a linear layer: one vector [B, D].

  A sum carries how many tokens said a thing; a mean or a softmax over mostly
  empty tokens thins out what the few objects have to say.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, vision, text, text_mask, vision_mask=None):
    """vision [B, N, D], text [B, L, D], their masks bool [B, L] and [B, N] or None -> [B, D]."""
    width = vision.shape[-1]
    # Of the real tokens only: the amount of padding must not matter.
    if vision_mask is None:
      seen = vision.sum(1) * vision.shape[1] ** -0.5
    else:
      seen = _masked_sum(vision, vision_mask)
    read = _masked_sum(text, text_mask)
    return (nn.Dense(width, dtype=self.dtype, name='vision_projection')(seen)
            + nn.Dense(width, dtype=self.dtype, name='text_projection')(read))


def _masked_sum(tokens, mask):
  """Tokens [B, N, D], mask bool [B, N] -> their sum by the root of their number, [B, D]."""
  counts = mask[..., None].astype(tokens.dtype)
  return (tokens * counts).sum(1) * jnp.maximum(counts.sum(1), 1) ** -0.5


class Backbone(nn.Module):
  """vision(image), text(tokens), sense(name, inputs), fuse(vision, text), decode(tokens, fused).

  A part that no task calls has no parameters.

  Attributes:
    vision_tower: a ViT, giving [B, N, D], or a ResNet, giving [B, H', W', C].
    text_tower: a T5, Bert or Gpt2.
    cross_modal: a CrossModal.
    image_mean, image_std: of each colour channel, for pixels in 0..1.
    pad_id: token number that is no text.
    decoder_tower: a T5, of which the decoder alone is used; None: the text tower's own.
    more_towers: towers of other senses, by the sense's name; see data.sense.
  """

  vision_tower: nn.Module
  text_tower: nn.Module
  cross_modal: nn.Module
  image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  pad_id: int = 0
  decoder_tower: nn.Module | None = None
  more_towers: Mapping[str, nn.Module] = FrozenDict()

  def setup(self):
    width, dtype = self.cross_modal.hidden_dim, self.cross_modal.dtype
    self.vision_projection = nn.Dense(width, dtype=dtype)
    self.vision_gate = nn.Dense(1, dtype=dtype)
    self.text_projection = nn.Dense(width, dtype=dtype)
    self.pool = SumPool(dtype)
    self.decoder_projection = nn.Dense(self._writer.hidden_dim, dtype=dtype)
    self.grid_position = GridPosition()
    for name in self.more_towers:
      setattr(self, f'{name}_projection', nn.Dense(width, dtype=dtype))

  @property
  def _writer(self):
    return self.text_tower if self.decoder_tower is None else self.decoder_tower

  def vision(self, image: jax.Array, extent: jax.Array | None = None, *,
             deterministic: bool) -> Stream:
    """Pictures, uint8 [B, H, W, 3] or float in 0..1, through the vision tower.

    extent: int32 [B, 2], the (height, width) in pixels, from the top left
    corner, that is not padding; None: all. Rows and columns count from that
    corner, so a picture's tokens have the same positions in an input of any size.
    """
    image = self.pixels(image)
    tokens = self.vision_tower(image, extent, deterministic=deterministic)
    if tokens.ndim == 4:  # a feature map: convolutions do not say where they are
      grid = tokens.shape[1:3]
      tokens = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
    else:
      patch = self.vision_tower.patch_size
      grid = (image.shape[1] // patch, image.shape[2] // patch)
    extra = tokens.shape[1] - grid[0] * grid[1]
    return Stream(tokens, Padding(extent, image.shape[1:3]).token_mask(grid, extra), grid)

  def pixels(self, image: jax.Array) -> jax.Array:
    """Pictures, uint8 [B, H, W, 3] or float in 0..1, as the vision tower sees them: float32."""
    if image.dtype == jnp.uint8:
      image = image.astype(jnp.float32) / 255
    return (image - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)

  def text(self, tokens: jax.Array, *, deterministic: bool) -> Stream:
    """Token numbers, int32 [B, L], through the text tower's encoder."""
    mask = tokens != self.pad_id
    return Stream(self.text_tower.encode(tokens, mask, deterministic=deterministic), mask)

  def read_names(self, tokens: jax.Array, end_token: bool, *, deterministic: bool) -> jax.Array:
    """Names, int32 [K, L], as vectors [K, D]: the mean of their tokens in the space of `align`.

    Each device reads a share of them. end_token: whether the mean includes the token that ends
    a name; where there is no other, it does.
    """
    text = self.text(split_rows(jnp.asarray(tokens, jnp.int32)), deterministic=deterministic)
    read, is_word = self.text_projection(text.tokens), text.mask
    if not end_token:
      rest = jnp.roll(is_word, -1, axis=1).at[:, -1].set(False)
      is_word = jnp.where(rest.any(1, keepdims=True), rest, is_word)
    is_word = is_word[..., None]
    return whole((read * is_word).sum(1) / is_word.sum(1))[:len(tokens)]

  def align(self, vision: Stream, text: Stream) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, N, D] and [B', L, D] in the space where the cross-modal layers compare them."""
    return self.seen(vision), self.text_projection(text.tokens)

  def seen(self, vision: Stream) -> jax.Array:
    """The tokens of a picture alone in that space, [B, N, D]."""
    return self.vision_projection(vision.tokens) * self._salience(vision)

  def _salience(self, vision):
    """[B, N, 1] in 0..1: towers end in a norm that makes empty background as loud as things."""
    return nn.sigmoid(self.vision_gate(vision.tokens))

  def sense(self, name: str, inputs: Mapping[str, jax.Array], *, deterministic: bool) -> Stream:
    """Inputs of another sense through its tower, in the space of `align`."""
    stream = self.more_towers[name](**inputs, deterministic=deterministic)
    project = getattr(self, f'{name}_projection')
    return dataclasses.replace(stream, tokens=project(stream.tokens))

  def fuse(self, vision: Stream, text: Stream, *more: Stream, deterministic: bool) -> Fused:
    """Picture and text through the cross-modal layers.

    Args:
      vision, text: from the towers.
      *more: of other senses, from `sense`; they go before the picture's tokens.
      deterministic: whether there is no dropout.
    """
    seen, read = self.align(vision, text)
    seen = Stream(self.grid_position(seen, vision.grid), vision.mask, vision.grid)
    seen = concatenate(*more, seen)
    both, read = self.cross_modal(seen.tokens, read, text.mask, seen.mask,
                                  deterministic=deterministic)
    salience = self._salience(vision)
    for stream in more:  # what another sense gives counts as it is
      salience = jnp.concatenate(
          [jnp.ones((*stream.tokens.shape[:2], 1), salience.dtype), salience], axis=1)
    pooled = self.pool(both * salience, read, text.mask, seen.mask)
    return Fused(both, read, text.mask, pooled, vision.grid, seen.mask)

  def decode(self, tokens: jax.Array, fused: Fused, *, deterministic: bool) -> jax.Array:
    """Logits [B, T, V] of the decoder, reading tokens int32 [B, T] and the fused."""
    encoded, mask = fused.tokens
    return self._writer.decode(tokens, self.decoder_projection(encoded), mask,
                               deterministic=deterministic)

  def decoder(self, fused: Fused, max_length: int, num_beams: int = 1):
    """A step function and its first cache, to write up to max_length tokens one by one."""
    encoded, mask = fused.tokens
    # Unbound, because a bound module cannot be called inside a compiled loop.
    tower, variables = self._writer.unbind()
    return start_writing(tower, variables, self.decoder_projection(encoded), mask, max_length,
                         num_beams)


class GridPosition(nn.Module):
  """Adds a learned embedding of row and column to the tokens [B, N, D] that lie on a grid."""

  @nn.compact
  def __call__(self, tokens, grid):
    rows, columns = grid
    width = tokens.shape[-1]
    row = self.param('row_embedding', _waves, (rows, width))
    column = self.param('column_embedding', _waves, (columns, width))
    table = (row[:, None] + jnp.roll(column, width // 2, axis=-1)).reshape(rows * columns, width)
    more = tokens.shape[1] - rows * columns  # a class token lies nowhere
    return tokens + jnp.pad(table, ((more, 0), (0, 0))).astype(tokens.dtype)


def _waves(rng, shape, dtype=jnp.float32):
  """Half-cosine waves over the places, the slowest of which runs straight from end to end.

  In the first half of the width, with a norm of sqrt(width / 2) on average.
  """
  del rng
  places, width = shape
  count = min(width // 2, max(places - 1, 1))
  phases = jnp.arange(1, count + 1) * (jnp.arange(places)[:, None] + 0.5) / places
  return jnp.pad((width / count) ** 0.5 * jnp.cos(jnp.pi * phases),
                 ((0, 0), (0, width - count))).astype(dtype)


class SharedTowers:
  """A backbone bound to one batch of pictures: each tower runs once, however many heads ask.

  Attributes:
    step: of training, int32 [B], all the same; None otherwise.
  """

  def __init__(self, backbone: Backbone, batch, deterministic: bool):
    self.step: jax.Array | None = batch.get('step')
    self._backbone, self._deterministic = backbone, deterministic
    self._batch, self._image, self._extent = batch, batch['image'], batch.get('extent')
    self._made = {}

  def _once(self, key, make):
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  @property
  def layer_options(self) -> dict:
    """dropout_rate and remat of the shared layers, for those that a head has of its own."""
    cross_modal = self._backbone.cross_modal
    return {'dropout_rate': cross_modal.dropout_rate, 'remat': cross_modal.remat}

  def image(self) -> tuple[jax.Array, jax.Array | None]:
    """The pictures as the batch has them, uint8 [B, H, W, 3], and their extent."""
    return self._image, self._extent

  def pixels(self) -> tuple[jax.Array, jax.Array | None]:
    """The pictures as the vision tower sees them, and their extent (see Backbone.vision)."""
    return self._once('pixels', lambda: self._backbone.pixels(self._image)), self._extent

  def vision(self) -> Stream:
    """The pictures through the vision tower."""
    return self._once('vision', lambda: self._backbone.vision(
        self._image, self._extent, deterministic=self._deterministic))

  def text(self, tokens: jax.Array) -> Stream:
    """Token numbers, int32 [B, L], through the text tower."""
    # The array is kept with its result: an id is unique only among the living.
    return self._once(('text', id(tokens)), lambda: (tokens, self._backbone.text(
        tokens, deterministic=self._deterministic)))[1]

  def names(self, names: Names) -> jax.Array:
    """Vectors [K, D] of names; see Backbone.read_names."""
    if names.vectors is not None:
      return names.vectors
    return self._backbone.read_names(names.tokens, names.end_token,
                                     deterministic=self._deterministic)

  def sense(self, name: str) -> Stream:
    """What the batch has for another sense, through its tower, as wide as `align` gives tokens."""
    return self._once(('sense', name), lambda: self._backbone.sense(
        name, self._batch[name], deterministic=self._deterministic))

  def fused(self, tokens: jax.Array, senses: Sequence[str] = ()) -> Fused:
    """The pictures, and what other senses give, joined with a text, int32 [B, L]."""
    return self._once(('fused', id(tokens), *senses), lambda: (tokens, self._backbone.fuse(
        self.vision(), self.text(tokens), *map(self.sense, senses),
        deterministic=self._deterministic)))[1]

  def align(self, vision: Stream, text: Stream) -> tuple[jax.Array, jax.Array]:
    """See Backbone.align."""
    return self._backbone.align(vision, text)

  def seen(self, vision: Stream) -> jax.Array:
    """See Backbone.seen."""
    return self._backbone.seen(vision)

  def decode(self, tokens: jax.Array, fused: Fused) -> jax.Array:
    """See Backbone.decode."""
    return self._backbone.decode(tokens, fused, deterministic=self._deterministic)

  def decoder(self, fused: Fused, max_length: int, num_beams: int = 1):
    """See Backbone.decoder."""
    return self._backbone.decoder(fused, max_length, num_beams)


class MultiTask(nn.Module):
  """One backbone under the heads of several tasks, of which those count that a batch is for.

  Attributes:
    backbone: the shared model.
    heads: task name -> the task's own module (see tasks.task.Task.head).
    lora: which kernels have adapters.
    vocabularies: task name -> the names that it looks for where a batch does not say ('vocabulary'
      among the task's features).
  """

  backbone: Backbone
  heads: dict[str, nn.Module]
  lora: Lora = Lora()
  vocabularies: Mapping[str, Names] = FrozenDict()

  def __call__(self, batch, *, deterministic: bool):
    """What each task's losses need: {task name: outputs}."""
    towers = SharedTowers(self.backbone, batch, deterministic)
    with adapters(self.lora, deterministic=deterministic):
      return {name: head(towers, self._features(batch, name), deterministic=deterministic)
              for name, head in self.heads.items() if name in batch}

  def predict(self, batch):
    """What each task decodes into predictions: {task name: arrays [B, ...]}."""
    towers = SharedTowers(self.backbone, batch, deterministic=True)
    with adapters(self.lora, deterministic=True):
      return {name: head.predict(towers, self._features(batch, name))
              for name, head in self.heads.items() if name in batch}

  def read_names(self, tokens: jax.Array, end_token: bool, *, deterministic: bool) -> jax.Array:
    """See Backbone.read_names."""
    with adapters(self.lora, deterministic=deterministic):
      return self.backbone.read_names(tokens, end_token, deterministic=deterministic)

  def _features(self, batch, name):
    if name not in self.vocabularies:
      return batch[name]
    return {'vocabulary': self.vocabularies[name], **batch[name]}
