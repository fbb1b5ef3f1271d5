"""ResNet (arXiv:1512.03385), v1.5 by default, as a backbone without its classifier."""

from collections.abc import Callable
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xmodal import target
from xmodal.errors import UserError
from xmodal.models.capture import offer
from xmodal.models.layers import check_sizes, rematerialized
from xmodal.models.padding import Padding
from xmodal.models.parts import PARTS


class Block(nn.Module):
  """Residual block, [B, H, W, C] -> [B, H/stride, W/stride, features].

  'basic': two 3x3 convolutions. 'bottleneck': 1x1 to a quarter of the
  features, 3x3, 1x1; the 3x3 has the stride (v1.5), or the first 1x1 (v1) if
  downsample_in_bottleneck is set. The 3x3 convolutions have the given dilation.
  """

  kind: str
  features: int
  stride: int
  downsample_in_bottleneck: bool
  dilation: int
  norm: Callable
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C'], padding: Padding
               ) -> Float[Array, 'B H2 W2 {self.features}']:
    """Maps [B, H, W, C] to [B, H/stride, W/stride, features]."""
    if self.kind == 'basic':
      convs = [(self.features, 3, self.stride), (self.features, 3, 1)]
    else:
      strides = (self.stride, 1) if self.downsample_in_bottleneck else (1, self.stride)
      narrow = self.features // 4
      convs = [(narrow, 1, strides[0]), (narrow, 3, strides[1]), (self.features, 1, 1)]
    y = x
    for i, (features, size, stride) in enumerate(convs, start=1):
      y = _conv(features, size, stride, self.dtype, f'conv{i}', self.dilation)(y)
      if i < len(convs):
        y = self.norm(features, name=f'conv{i}_norm')(y, mask=padding.mask_like(y))
        y = padding.clear(nn.relu(y))
    # Each block starts as its shortcut (arXiv:1706.02677, section 5.1).
    y = self.norm(self.features, scale_init=nn.initializers.zeros,
                  name=f'conv{i}_norm')(y, mask=padding.mask_like(y))
    if x.shape[-1] != self.features or self.stride != 1:
      x = _conv(self.features, 1, self.stride, self.dtype, 'shortcut')(x)
      x = self.norm(self.features, name='shortcut_norm')(x, mask=padding.mask_like(x))
    x = padding.clear(nn.relu(x + y))
    offer(self, 'tokens', lambda: x)
    return x


def _conv(features, size, stride, dtype, name, dilation=1):
  # PyTorch's padding: 'SAME' differs for even sides and stride 2.
  padding = size // 2 * dilation
  as_product = size == 1 and target.platform() == 'cpu'
  return nn.Conv(features, (size, size), stride, [(padding, padding)] * 2, use_bias=False,
                 kernel_dilation=dilation, dtype=dtype, kernel_init=nn.initializers.he_normal(),
                 conv_general_dilated=_pointwise if as_product else None, name=name)


def _pointwise(x, kernel, strides, *_, precision=None, **__):
  """A 1x1 convolution as a matrix product.

  For a convolution's gradient XLA transposes the input on a CPU, which takes longer than the rest.
  """
  rows, columns = strides
  return jax.lax.dot_general(x[:, ::rows, ::columns], kernel[0, 0], (((3,), (0,)), ((), ())),
                             precision=precision)


PRESETS = {
    'tiny': dict(block='basic', stem='small', norm='group', embedding_size=16,
                 downsample_in_first_stage=True, widths=(16, 32, 64), stage_sizes=(1, 1, 1)),
    'small': dict(block='basic', norm='group', widths=(64, 128, 256, 512),
                  stage_sizes=(2, 2, 2, 2)),
    'base': dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
                 stage_sizes=(3, 4, 6, 3)),
    'large': dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
                  stage_sizes=(3, 4, 23, 3)),
    'xl': dict(block='bottleneck', norm='group', widths=(256, 512, 1024, 2048),
               stage_sizes=(3, 8, 36, 3)),
}


# Layers are blocks, such as stage1_block2; in a DETR they are named resnet/stage1_block2.
@PARTS.register('resnet', slot='vision', presets=PRESETS,
                numbered_layers=(r'(?:resnet/)?stage(\d+)_block(\d+)',))
class ResNet(nn.Module):
  """Maps normalised images [B, H, W, 3] to a feature map [B, H', W', C].

  After the stem, every stage but the first halves the sides, rounded up:
  with four stages H' = H/32 with stem 'imagenet' and H/8 with 'small'.

  Attributes:
    block: 'basic' or 'bottleneck'.
    stage_sizes: blocks in each stage, (3, 4, 6, 3) for ResNet-50.
    widths: output features of each stage, (256, 512, 1024, 2048) for ResNet-50.
    embedding_size: output features of the stem.
    norm: 'batch' (statistics in the collection `batch_stats`) or 'group'.
    frozen_statistics: batch norm uses its stored statistics in training too.
    downsample_in_first_stage: whether the first stage halves the sides too.
    downsample_in_bottleneck: which convolution of a bottleneck has the stride, see Block.
    dilate_last_stage: the last stage keeps the sides, and all its blocks but the
      first have dilation 2 (DC5 of arXiv:2005.12872, as in torchvision and timm);
      only for 'bottleneck'.
    stem: 'imagenet' (7x7 convolution of stride 2 and max pooling of stride 2)
      or 'small' (3x3 convolution of stride 1, for small pictures).
    dropout_rate: dropout in training, on the features that come out.
    dtype: of the computation; parameters and statistics are float32.
    remat: 'none', 'full' or 'dots', for each block, see layers.REMAT_POLICIES.
  """

  block: str
  stage_sizes: tuple[int, ...]
  widths: tuple[int, ...]
  embedding_size: int = 64
  norm: str = 'batch'
  frozen_statistics: bool = True
  downsample_in_first_stage: bool = False
  downsample_in_bottleneck: bool = False
  dilate_last_stage: bool = False
  stem: str = 'imagenet'
  dropout_rate: float = 0.
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, images: Float[Array, 'B H W 3'], extent: Int[Array, 'B 2'] | None = None, *,
               deterministic: bool = True) -> Float[Array, 'B H2 W2 C']:
    """Maps float images [B, H, W, 3] to features [B, H', W', C].

    Batch norm uses the batch's statistics and updates the stored ones, unless
    deterministic or frozen_statistics. With an extent (see padding.Padding)
    the statistics of norms exclude the padding, and features in it are 0.

    Raises:
      UserError: the block, norm or stem is unknown, or the block cannot dilate.
    """
    self.check()
    norm = self._norm(deterministic)
    padding = Padding(extent, images.shape[1:3])
    size, stride = (7, 2) if self.stem == 'imagenet' else (3, 1)
    x = padding.clear(images.astype(self.dtype))
    x = _conv(self.embedding_size, size, stride, self.dtype, 'stem')(x)
    x = norm(self.embedding_size, name='stem_norm')(x, mask=padding.mask_like(x))
    x = padding.clear(nn.relu(x))
    if self.stem == 'imagenet':
      x = padding.clear(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    for i, (num_blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
      dilate = self.dilate_last_stage and i == len(self.stage_sizes) - 1
      for j in range(num_blocks):
        halve = j == 0 and not dilate and (i > 0 or self.downsample_in_first_stage)
        block = Block(self.block, width, 2 if halve else 1, self.downsample_in_bottleneck,
                      2 if dilate and j > 0 else 1, norm, self.dtype,
                      name=f'stage{i + 1}_block{j + 1}')
        x = rematerialized(lambda block, x: block(x, padding), self.remat)(block, x)
    return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)

  def _norm(self, deterministic):
    def batch_norm(features, **kwargs):
      del features
      return nn.BatchNorm(deterministic or self.frozen_statistics, momentum=0.9, epsilon=1e-5,
                          dtype=self.dtype, **kwargs)

    def group_norm(features, **kwargs):
      # 32 groups (arXiv:1803.08494), or fewer if 32 does not divide the channels.
      return nn.GroupNorm(math.gcd(32, features), epsilon=1e-5, dtype=self.dtype, **kwargs)

    return batch_norm if self.norm == 'batch' else group_norm

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    check_sizes('ResNet', self, 'stage_sizes', 'widths', 'embedding_size')
    if len(self.stage_sizes) != len(self.widths) or not self.widths:
      raise UserError(f'ResNet: stage_sizes are {self.stage_sizes} and widths {self.widths}; '
                      'wanted one of each for a stage')
    for field, known in (('block', ('basic', 'bottleneck')), ('norm', ('batch', 'group')),
                         ('stem', ('imagenet', 'small'))):
      if getattr(self, field) not in known:
        raise UserError(f'ResNet: {field} {getattr(self, field)!r} is unknown; use one of {known}')
    if self.dilate_last_stage and self.block != 'bottleneck':
      raise UserError(f"ResNet: dilate_last_stage is of blocks 'bottleneck', found {self.block!r}; "
                      'leave it out')
    if self.block == 'bottleneck' and min(self.widths) < 4:
      raise UserError(f'ResNet: widths are {self.widths}, wanted 4 or more: a bottleneck has a '
                      'quarter of them')
