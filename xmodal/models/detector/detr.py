"""DETR (arXiv:2005.12872): a fixed set of queries, each of which detects one object or none."""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from xmodal.errors import UserError
from xmodal.models.layers import check_sizes, scan_layers
from xmodal.models.towers.detr_encoder import Layer, encode, norm
from xmodal.models.towers.resnet import ResNet


class DetrDecoderLayer(Layer):
  """Self-attention, cross-attention to the picture, and MLP: [B, Q, D] -> [B, Q, D]."""

  @nn.compact
  def __call__(self, x: Float[Array, 'B Q D'], positions: Float[Array, '1 Q D'],
               picture: Float[Array, 'B N D'], picture_positions: Float[Array, '#B N D'], *,
               mask: Bool[Array, 'B 1 1 N'] | None, deterministic: bool) -> Float[Array, 'B Q D']:
    x = self.attend('attention', x, positions, x, positions, None, deterministic)
    x = self.attend('cross_attention', x, positions, picture, picture_positions, mask,
                     deterministic)
    return self.feed_forward(x, deterministic)


class Detr(nn.Module):
  """Predicts Q classes and boxes for each normalised image of [B, H, W, 3].

  Attributes:
    backbone: a ResNet; it computes in the dtype of this module.
    class_names: names of the C classes; class C is "no object".
    hidden_dim: D.
    num_queries: Q, the maximum number of detections.
    num_layers, num_heads, mlp_dim: sizes of the encoder.
    num_decoder_layers, num_decoder_heads, decoder_mlp_dim: sizes of the decoder.
    activation: activation of the layers' MLPs, see `layers.Mlp`.
    dropout_rate: dropout in training, on each sublayer's output.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters and results are float32.
    remat: see `layers.scan_layers`.
    scan_unroll: see `layers.scan_layers`.
  """

  backbone: ResNet
  class_names: tuple[str, ...]
  hidden_dim: int = 256
  num_queries: int = 100
  num_layers: int = 6
  num_heads: int = 8
  mlp_dim: int = 2048
  num_decoder_layers: int = 6
  num_decoder_heads: int = 8
  decoder_mlp_dim: int = 2048
  activation: str = 'relu'
  dropout_rate: float = 0.
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], mask: Bool[Array, '...'] | None = None, *,
               deterministic: bool = True
               ) -> tuple[Float[Array, 'B Q classes'], Float[Array, 'B Q 4']]:
    """Predicts classes and boxes.

    Args:
      images: float [B, H, W, 3]; 0 in the padding.
      mask: bool [B, H, W], False for padding; None: no padding.
      deterministic: no dropout.

    Returns:
      float32 logits [B, Q, C + 1], the last of which is for "no object", and
      float32 boxes [B, Q, 4]: centre x, centre y, width and height, in 0..1 of
      the picture without its padding.

    Raises:
      UserError: the mask's shape does not match the images, or the number of heads or
        4 does not divide D.
    """
    self._check(images, mask)
    features = self.backbone.clone(parent=self, name='resnet', dtype=self.dtype)(
        images, deterministic=deterministic)
    mask = None if mask is None else _shrink(mask, features.shape[1:3])
    x, positions, key_mask = encode(self, features, mask, deterministic)
    return self._heads(self._decode(x, positions, key_mask, deterministic))

  def _decode(self, picture, positions, key_mask, deterministic):
    """Decodes an encoded picture [B, N, D] into query states [B, Q, D]."""
    queries = self.param('query_position_embedding', nn.initializers.normal(1.),
                         (self.num_queries, self.hidden_dim))
    queries = queries[None].astype(self.dtype)
    layer = DetrDecoderLayer(self.hidden_dim, self.decoder_mlp_dim, self.num_decoder_heads,
                         *self._shared(), name='decoder_layers')
    x, _ = scan_layers(
        lambda layer, x, _: (layer(x, queries, picture, positions, mask=key_mask,
                                   deterministic=deterministic), None),
        layer, jnp.zeros((picture.shape[0], *queries.shape[1:]), self.dtype),
        num_layers=self.num_decoder_layers, remat=self.remat, unroll=self.scan_unroll)
    return norm(self.dtype, 'decoder_norm')(x)

  def _heads(self, x):
    """Maps query states [B, Q, D] to float32 logits [B, Q, C + 1] and boxes [B, Q, 4]."""
    x = x.astype(jnp.float32)
    logits = nn.Dense(len(self.class_names) + 1, name='class_head')(x)
    for i in (1, 2):
      x = nn.relu(nn.Dense(self.hidden_dim, name=f'box_hidden{i}')(x))
    return logits, nn.sigmoid(nn.Dense(4, name='box_out')(x))

  def _shared(self):
    return self.activation, self.dropout_rate, self.attention, self.dtype

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    self.backbone.check()
    check_sizes('Detr', self, 'hidden_dim', 'num_queries', 'num_layers', 'num_heads', 'mlp_dim',
                'num_decoder_layers', 'num_decoder_heads', 'decoder_mlp_dim')
    for divisor in (self.num_heads, self.num_decoder_heads, 4):
      if self.hidden_dim % divisor:
        raise UserError(f'Detr: hidden_dim {self.hidden_dim} does not divide by {divisor}; the '
                        'heads must divide it, and 4 for the sines of the positions')

  def _check(self, images, mask):
    self.check()
    if mask is not None and mask.shape != images.shape[:3]:
      raise UserError(f'Detr: the mask is {mask.shape}, {images.shape[:3]} is wanted for images '
                      f'{images.shape}; give a bool for each pixel')


def _shrink(mask, size):
  """Resizes a mask [B, H, W] to (rows, columns) by nearest interpolation, as PyTorch does."""
  for axis, (full, wanted) in enumerate(zip(mask.shape[1:], size), start=1):
    scale = np.float32(full) / np.float32(wanted)  # in float32, as PyTorch rounds
    pixels = np.floor(np.arange(wanted, dtype=np.float32) * scale).astype(int)
    mask = jnp.take(mask, np.minimum(pixels, full - 1), axis=axis)
  return mask
