"""VGG (arXiv:1409.1556) as a backbone without its classifier."""

import functools

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xmodal.errors import UserError
from xmodal.models.capture import offer
from xmodal.models.layers import check_sizes, rematerialized
from xmodal.models.padding import Padding
from xmodal.models.parts import PARTS

PRESETS = {
    'tiny': dict(stage_sizes=(1, 1, 1), widths=(16, 32, 64)),
    'small': dict(stage_sizes=(1, 1, 2, 2, 2)),
    'base': dict(stage_sizes=(2, 2, 3, 3, 3)),
    'large': dict(stage_sizes=(2, 2, 4, 4, 4)),
    'xl': dict(stage_sizes=(2, 2, 4, 4, 4)),
}


@PARTS.register('vgg', slot='vision', presets=PRESETS,
                numbered_layers=(r'stage(\d+)_conv(\d+)',))  # stage1_conv2, stage1_conv2_norm
class VGG(nn.Module):
  """Maps normalised images [B, H, W, 3] to a feature map [B, H/32, W/32, C].

  Each stage has 3x3 convolutions with ReLU, then 2x2 max pooling, which drops the
  last row or column of an odd side.

  Attributes:
    stage_sizes: convolutions in each stage, (2, 2, 3, 3, 3) for VGG-16.
    widths: output features of each stage; C is the last.
    batch_norm: whether batch norm follows each convolution (statistics in the collection
      `batch_stats`).
    frozen_statistics: batch norm uses its stored statistics in training too.
    dropout_rate: dropout in training, on the output features.
    dtype: of the computation; parameters and statistics are float32.
    remat: 'none', 'full' or 'dots', for each stage, see layers.REMAT_POLICIES.
  """

  stage_sizes: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  batch_norm: bool = False
  frozen_statistics: bool = True
  dropout_rate: float = 0.
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    check_sizes('VGG', self, 'stage_sizes', 'widths')
    if len(self.stage_sizes) != len(self.widths) or not self.widths:
      raise UserError(f'VGG: stage_sizes are {self.stage_sizes} and widths {self.widths}; wanted '
                      'one of each for a stage')

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], extent: Int[Array, 'B 2'] | None = None, *,
               deterministic: bool = True) -> Float[Array, 'B H2 W2 {self.widths[-1]}']:
    """Maps float images [B, H, W, 3] to features [B, H/32, W/32, C].

    Batch norm uses the batch's statistics and updates the stored ones, unless
    deterministic or frozen_statistics. With an extent (see padding.Padding)
    the statistics of norms exclude the padding, and features in it are 0.

    Raises:
      UserError: the pictures are too small to be halved in each stage.
    """
    self.check()
    smallest = 2 ** len(self.stage_sizes)
    if min(images.shape[1:3]) < smallest:
      raise UserError(f'VGG: pictures are {images.shape[1:3]} (height, width), {smallest} or more '
                      'is wanted; take a larger image_size')
    padding = Padding(extent, images.shape[1:3])
    x = padding.clear(images.astype(self.dtype))
    for i in range(len(self.stage_sizes)):
      stage = rematerialized(functools.partial(_stage, i=i, padding=padding,
                                               deterministic=deterministic), self.remat)
      x = stage(self, x)
    return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)


def _stage(vgg, x, *, i, padding, deterministic):
  for j in range(vgg.stage_sizes[i]):
    name = f'stage{i + 1}_conv{j + 1}'
    x = nn.Conv(vgg.widths[i], (3, 3), padding=1, dtype=vgg.dtype, parent=vgg,
                kernel_init=nn.initializers.he_normal(), name=name)(x)
    if vgg.batch_norm:
      x = nn.BatchNorm(deterministic or vgg.frozen_statistics, momentum=0.9, epsilon=1e-5,
                       dtype=vgg.dtype, parent=vgg, name=f'{name}_norm')(
                           x, mask=padding.mask_like(x))
    x = padding.clear(nn.relu(x))
  x = padding.clear(nn.max_pool(x, (2, 2), (2, 2)))
  offer(vgg, f'stage{i + 1}', lambda: x)
  return x
