"""The shared model: a vision tower, a text tower, and the layers that join them."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses

from flax import linen as nn
from flax.core import FrozenDict
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from xmodal.errors import UserError
from xmodal.models.attention import IMPLEMENTATIONS
from xmodal.models.layers import REMAT
from xmodal.models.layout import split_rows, whole
from xmodal.models.lora import Lora, adapters
from xmodal.models.names import Names
from xmodal.models.padding import Padding
from xmodal.models.parts import SIZES
from xmodal.models.quantized import ROUNDINGS, Rounding, integer_products
from xmodal.models.stream import Stream, concatenate
from xmodal.models.towers.t5 import start_writing
from xmodal.options import Option

OPTIONS = {
    'size': Option('tiny', 'Preset of the sizes that the parts of the model leave unset.',
                   choices=SIZES),
    'dtype': Option('auto', 'Computation dtype; auto: bfloat16 on accelerators, float32 on CPU.',
                    choices=('auto', 'float32', 'bfloat16'), may_change=True),
    'attention': Option('auto', 'Attention kernel; cudnn: NVIDIA, bfloat16, no dropout; auto: '
                        'cudnn where it is possible and faster.', choices=IMPLEMENTATIONS,
                        may_change=True),
    'remat': Option('auto', 'What the backward pass recomputes; full: layers; dots: all but linear '
                    'layers, convolutions and flash attention; auto: dots on accelerators, none '
                    'on CPU.', choices=REMAT, may_change=True),
    'quantize': Option('', 'Rounds weights, and for int8 activations too, in steps and in '
                       "evaluations; '': not.", choices=('', *ROUNDINGS), may_change=True),
    'dropout_rate': Option(0.0, 'Dropout rate of all layers.', low=0, high=0.99)}

Image = UInt8[Array, 'B H W 3'] | Float[Array, 'B H W 3']


@dataclasses.dataclass(frozen=True)
class Fused:
  """Picture and text after the cross-modal layers.

  Attributes:
    vision: [B, N, D].
    text: [B, L, D].
    mask: bool [B, L] of the text, False for padding.
    pooled: [B, D], one vector for both.
    grid: (rows, columns) of the last rows * columns vision tokens.
    vision_mask: bool [B, N], False for padding of the picture; None: no padding.
  """

  vision: Float[Array, 'B N D']
  text: Float[Array, 'B L D']
  mask: Bool[Array, 'B L']
  pooled: Float[Array, 'B D']
  grid: tuple[int, int]
  vision_mask: Bool[Array, 'B N'] | None = None

  @property
  def tokens(self) -> tuple[Float[Array, 'B M D'], Bool[Array, 'B M']]:
    """Concatenated vision and text tokens, [B, N + L, D], and their mask, bool [B, N + L]."""
    both = concatenate(Stream(self.vision, self.vision_mask), Stream(self.text, self.mask))
    return both.tokens, both.mask

  def repeat(self, number: int) -> 'Fused':
    """Repeats each row `number` times, in consecutive rows."""
    if number == 1:
      return self
    return dataclasses.replace(self, **{
        name: jnp.repeat(getattr(self, name), number, axis=0)
        for name in ('vision', 'text', 'mask', 'pooled', 'vision_mask')
        if getattr(self, name) is not None})


class SumPool(nn.Module):
  """Sums each stream over its tokens and projects it; adds both to one vector [B, D].

  A sum preserves counts; a mean or a softmax over mostly empty tokens would dilute the
  few objects. Sums are divided by the square root of the number of tokens.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, vision: Float[Array, 'B N D'], text: Float[Array, 'B L D'],
               text_mask: Bool[Array, 'B L'], vision_mask: Bool[Array, 'B N'] | None = None
               ) -> Float[Array, 'B D']:
    """Pools vision [B, N, D] and text [B, L, D] to [B, D]."""
    width = vision.shape[-1]
    # Only real tokens: the amount of padding must not matter.
    if vision_mask is None:
      vision_sum = vision.sum(1) * vision.shape[1] ** -0.5
    else:
      vision_sum = _masked_sum(vision, vision_mask)
    text_sum = _masked_sum(text, text_mask)
    return (nn.Dense(width, dtype=self.dtype, name='vision_projection')(vision_sum)
            + nn.Dense(width, dtype=self.dtype, name='text_projection')(text_sum))


def _masked_sum(tokens, mask):
  """Sum of unmasked tokens [B, N, D] divided by the square root of their number: [B, D]."""
  counts = mask[..., None].astype(tokens.dtype)
  return (tokens * counts).sum(1) * jnp.maximum(counts.sum(1), 1) ** -0.5


class Backbone(nn.Module):
  """vision(image), text(tokens), sense(name, inputs), fuse(vision, text), decode(tokens, fused).

  Parts that no task calls have no parameters.

  Attributes:
    vision_tower: its output is a Stream, tokens [B, N, D] of a ViT, or a feature map
      [B, H', W', C], as of a ResNet or VGG.
    text_tower: a T5, Bert or Gpt2, or another whose output is a Stream or tokens [B, L, D].
    cross_modal: a CrossModal.
    image_mean, image_std: per colour channel, for pixels in 0..1.
    pad_id: id of the pad token.
    decoder_tower: a T5 of which only the decoder is used; None: the text tower's decoder.
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

  def vision(self, image: Image, extent: Int[Array, 'B 2'] | None = None, *,
             deterministic: bool) -> Stream:
    """Encodes pictures with the vision tower.

    Args:
      image: uint8 [B, H, W, 3], or float in 0..1.
      extent: int32 [B, 2], (height, width) in pixels of the part that is not padding, from
        the top left corner; None: no padding. Rows and columns count from that corner, so
        a picture's tokens have the same positions in an input of any size.
      deterministic: no dropout.
    """
    image = self.pixels(image)
    tokens = self.vision_tower(image, extent, deterministic=deterministic)
    if isinstance(tokens, Stream):
      if tokens.grid is None:
        raise UserError(f'the vision tower {type(self.vision_tower).__name__} gives a Stream '
                        'without a grid: give it (rows, columns) of its last tokens')
      return tokens
    if tokens.ndim == 4:  # a feature map
      grid = tokens.shape[1:3]
      tokens = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
    else:
      patch = self.vision_tower.patch_size
      grid = (image.shape[1] // patch, image.shape[2] // patch)
    extra = tokens.shape[1] - grid[0] * grid[1]
    return Stream(tokens, Padding(extent, image.shape[1:3]).token_mask(grid, extra), grid)

  def pixels(self, image: Image) -> Float[Array, 'B H W 3']:
    """Normalises pictures, uint8 [B, H, W, 3] or float in 0..1, for the vision tower: float32."""
    if image.dtype == jnp.uint8:
      image = image.astype(jnp.float32) / 255
    return (image - jnp.asarray(self.image_mean)) / jnp.asarray(self.image_std)

  def text(self, tokens: Int[Array, 'B L'], *, deterministic: bool) -> Stream:
    """Encodes token ids, int32 [B, L], with the text tower."""
    mask = tokens != self.pad_id
    read = self.text_tower.encode(tokens, mask, deterministic=deterministic)
    return Stream(read.tokens, read.full_mask) if isinstance(read, Stream) else Stream(read, mask)

  def read_names(self, tokens: Int[Array, 'K L'], end_token: bool, *, deterministic: bool
                 ) -> Float[Array, 'K D']:
    """Encodes names, int32 [K, L], to vectors [K, D]: the mean of their tokens, as from `align`.

    The names are split over the devices.

    Args:
      tokens: the names.
      end_token: whether the mean includes a name's end token. It always does if the name has
        no other token.
      deterministic: no dropout.
    """
    text = self.text(split_rows(jnp.asarray(tokens, jnp.int32)), deterministic=deterministic)
    read, is_word = self.text_projection(text.tokens), text.mask
    if not end_token:
      rest = jnp.roll(is_word, -1, axis=1).at[:, -1].set(False)
      is_word = jnp.where(rest.any(1, keepdims=True), rest, is_word)
    is_word = is_word[..., None]
    return whole((read * is_word).sum(1) / is_word.sum(1))[:tokens.shape[0]]

  def align(self, vision: Stream, text: Stream
            ) -> tuple[Float[Array, 'B N D'], Float[Array, 'C L D']]:
    """Projects tokens to the cross-modal layers' shared space: [B, N, D] and [B', L, D]."""
    return self.align_vision(vision), self.text_projection(text.tokens)

  def align_vision(self, vision: Stream) -> Float[Array, 'B N D']:
    """Projects only the vision tokens to that space, [B, N, D]."""
    return self.vision_projection(vision.tokens) * self._salience(vision)

  def _salience(self, vision):
    """Gate [B, N, 1] in 0..1. The towers' final norm gives empty background the norm of objects."""
    return nn.sigmoid(self.vision_gate(vision.tokens))

  def sense(self, name: str, inputs: Mapping[str, jax.Array], *, deterministic: bool) -> Stream:
    """Encodes inputs of another sense with its tower, in the space of `align`."""
    stream = self.more_towers[name](**inputs, deterministic=deterministic)
    project = getattr(self, f'{name}_projection')
    return dataclasses.replace(stream, tokens=project(stream.tokens))

  def fuse(self, vision: Stream, text: Stream, *more: Stream, deterministic: bool) -> Fused:
    """Runs the cross-modal layers on picture and text.

    Args:
      vision, text: from the towers.
      *more: streams of other senses, from `sense`; they precede the picture's tokens.
      deterministic: no dropout.
    """
    vision_tokens, text_tokens = self.align(vision, text)
    seen = Stream(self.grid_position(vision_tokens, vision.grid), vision.mask, vision.grid)
    seen = concatenate(*more, seen)
    vision_tokens, text_tokens = self.cross_modal(seen.tokens, text_tokens, text.mask, seen.mask,
                                                  deterministic=deterministic)
    salience = self._salience(vision)
    for stream in more:  # tokens of other senses have no gate
      salience = jnp.concatenate(
          [jnp.ones((*stream.tokens.shape[:2], 1), salience.dtype), salience], axis=1)
    pooled = self.pool(vision_tokens * salience, text_tokens, text.mask, seen.mask)
    return Fused(vision_tokens, text_tokens, text.mask, pooled, vision.grid, seen.mask)

  def decode(self, tokens: Int[Array, 'B T'], fused: Fused, *, deterministic: bool
             ) -> Float[Array, 'B T V']:
    """Decoder logits [B, T, V] for tokens int32 [B, T], with cross-attention to `fused`."""
    encoded, mask = fused.tokens
    return self._writer.decode(tokens, self.decoder_projection(encoded), mask,
                               deterministic=deterministic)

  def decoder(self, fused: Fused, max_length: int, num_beams: int = 1) -> tuple[Callable, dict]:
    """A step function and its initial cache, to decode up to max_length tokens one by one."""
    encoded, mask = fused.tokens
    # Unbound: a bound module cannot be called inside a compiled loop.
    tower, variables = self._writer.unbind()
    return start_writing(tower, variables, self.decoder_projection(encoded), mask, max_length,
                         num_beams)


class GridPosition(nn.Module):
  """Adds learned row and column embeddings to the tokens [B, N, D] of a grid."""

  @nn.compact
  def __call__(self, tokens: Float[Array, 'B N D'], grid: tuple[int, int]
               ) -> Float[Array, 'B N D']:
    rows, columns = grid
    width = tokens.shape[-1]
    row = self.param('row_embedding', _waves, (rows, width))
    column = self.param('column_embedding', _waves, (columns, width))
    table = (row[:, None] + jnp.roll(column, width // 2, axis=-1)).reshape(rows * columns, width)
    more = tokens.shape[1] - rows * columns  # a class token has no position
    return tokens + jnp.pad(table, ((more, 0), (0, 0))).astype(tokens.dtype)


def _waves(rng, shape, dtype=jnp.float32):
  """Initialiser: half-cosine waves over the positions; the slowest one is monotonic.

  They fill the first half of the width; their average norm is sqrt(width / 2).
  """
  del rng
  places, width = shape
  count = min(width // 2, max(places - 1, 1))
  phases = jnp.arange(1, count + 1) * (jnp.arange(places)[:, None] + 0.5) / places
  return jnp.pad((width / count) ** 0.5 * jnp.cos(jnp.pi * phases),
                 ((0, 0), (0, width - count))).astype(dtype)


class SharedTowers:
  """A backbone bound to one batch of pictures. All heads share each tower's single run.

  Attributes:
    step: the training step, int32 [B], all equal; None otherwise.
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
    """dropout_rate and remat of the shared layers, for a head's own layers."""
    cross_modal = self._backbone.cross_modal
    return {'dropout_rate': cross_modal.dropout_rate, 'remat': cross_modal.remat}

  def image(self) -> tuple[Image, Int[Array, 'B 2'] | None]:
    """The pictures of the batch, uint8 [B, H, W, 3], and their extent."""
    return self._image, self._extent

  def pixels(self) -> tuple[Float[Array, 'B H W 3'], Int[Array, 'B 2'] | None]:
    """The pictures, normalised for the vision tower, and their extent (see Backbone.vision)."""
    return self._once('pixels', lambda: self._backbone.pixels(self._image)), self._extent

  def vision(self) -> Stream:
    """The pictures, encoded by the vision tower."""
    return self._once('vision', lambda: self._backbone.vision(
        self._image, self._extent, deterministic=self._deterministic))

  def text(self, tokens: Int[Array, 'B L']) -> Stream:
    """Token ids, int32 [B, L], encoded by the text tower."""
    # Keep the array with its result: an id is unique only while its object lives.
    return self._once(('text', id(tokens)), lambda: (tokens, self._backbone.text(
        tokens, deterministic=self._deterministic)))[1]

  def names(self, names: Names) -> Float[Array, 'K D']:
    """Vectors [K, D] of names; see Backbone.read_names."""
    if names.vectors is not None:
      return names.vectors
    return self._backbone.read_names(names.tokens, names.end_token,
                                     deterministic=self._deterministic)

  def sense(self, name: str) -> Stream:
    """The batch's inputs of another sense, encoded in the space of `align`."""
    return self._once(('sense', name), lambda: self._backbone.sense(
        name, self._batch[name], deterministic=self._deterministic))

  def fused(self, tokens: Int[Array, 'B L'], senses: Sequence[str] = ()) -> Fused:
    """The pictures and other senses, fused with a text, int32 [B, L]."""
    return self._once(('fused', id(tokens), *senses), lambda: (tokens, self._backbone.fuse(
        self.vision(), self.text(tokens), *map(self.sense, senses),
        deterministic=self._deterministic)))[1]

  def align(self, vision: Stream, text: Stream
            ) -> tuple[Float[Array, 'B N D'], Float[Array, 'C L D']]:
    """See Backbone.align."""
    return self._backbone.align(vision, text)

  def align_vision(self, vision: Stream) -> Float[Array, 'B N D']:
    """See Backbone.align_vision."""
    return self._backbone.align_vision(vision)

  def decode(self, tokens: Int[Array, 'B T'], fused: Fused) -> Float[Array, 'B T V']:
    """See Backbone.decode."""
    return self._backbone.decode(tokens, fused, deterministic=self._deterministic)

  def decoder(self, fused: Fused, max_length: int, num_beams: int = 1) -> tuple[Callable, dict]:
    """See Backbone.decoder."""
    return self._backbone.decoder(fused, max_length, num_beams)


class MultiTask(nn.Module):
  """One backbone with the heads of several tasks. A batch runs the heads whose features it has.

  Attributes:
    backbone: the shared model.
    heads: task name -> the task's own module (see tasks.task.Task.head).
    lora: adapters of the kernels.
    vocabularies: task name -> the names to look for, unless the task's features in a batch have
      'vocabulary'.
    rounding: how a training step and an evaluation round parameters; None: not.
  """

  backbone: Backbone
  heads: dict[str, nn.Module]
  lora: Lora = Lora()
  vocabularies: Mapping[str, Names] = FrozenDict()
  rounding: Rounding | None = None

  def __call__(self, batch, *, deterministic: bool):
    """Inputs of each task's losses: {task name: outputs}."""
    towers = SharedTowers(self.backbone, batch, deterministic)
    with _layers(self, deterministic):
      return {name: head(towers, self._features(batch, name), deterministic=deterministic)
              for name, head in self.heads.items() if name in batch}

  def predict(self, batch):
    """Inputs of each task's `decode`: {task name: arrays [B, ...]}."""
    towers = SharedTowers(self.backbone, batch, deterministic=True)
    with _layers(self, True):
      return {name: head.predict(towers, self._features(batch, name))
              for name, head in self.heads.items() if name in batch}

  def read_names(self, tokens: Int[Array, 'K L'], end_token: bool, *, deterministic: bool
                 ) -> Float[Array, 'K D']:
    """See Backbone.read_names."""
    with _layers(self, deterministic):
      return self.backbone.read_names(tokens, end_token, deterministic=deterministic)

  def _features(self, batch, name):
    if name not in self.vocabularies:
      return batch[name]
    return {'vocabulary': self.vocabularies[name], **batch[name]}


@contextlib.contextmanager
def _layers(model, deterministic):
  """Changes what linear layers compute: adapters, and products of integers."""
  with (adapters(model.lora, deterministic=deterministic),
        integer_products(model.variables.get('params', {}))):
    yield
