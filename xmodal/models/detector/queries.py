"""Detection queries: the image tokens themselves, or learned queries that attend to them.

Both kinds map image tokens [B, N', D] on a grid to queries [B, N, D] and a reference
box per query, float32 [N, 4]: centre x, centre y, width and height in 0..1 of the
input. A head predicts each query's proposal as a difference from its reference, then
refines it from the pixels around it.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xmodal.models.cross_modal import Sublayers
from xmodal.models.detector.boxes import to_center, to_corners
from xmodal.models.detector.glimpse import glimpse
from xmodal.models.joint import Fused
from xmodal.models.layers import Mlp, rematerialized


def token_references(grid: tuple[int, int], cells: float = 2.0
                     ) -> Float[Array, '{grid[0]*grid[1]} 4']:
  """Reference boxes `cells` wide and high around each token's centre, [rows * columns, 4]."""
  rows, columns = grid
  y, x = jnp.meshgrid((jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns,
                      indexing='ij')
  size = jnp.full(x.shape, cells)
  return jnp.stack([x, y, size / columns, size / rows], axis=-1).reshape(-1, 4)


class LearnedQueries(Sublayers):
  """Learned queries with decoder layers: self- and cross-attention, MLP (arXiv:2005.12872).

  Attributes besides the sizes (see CrossModal):
    num_queries: N.
    num_layers: layers of the decoder.
    remat: see `layers.rematerialized`.
  """

  num_queries: int = 100
  num_layers: int = 1
  remat: str = 'none'

  @nn.compact
  def __call__(self, tokens: Float[Array, 'B M D'], mask: Bool[Array, 'B M'] | None, *,
               deterministic: bool
               ) -> tuple[Float[Array, 'B {self.num_queries} D'],
                          Float[Array, '{self.num_queries} 4']]:
    """Queries [B, N, D] and references [N, 4] from tokens [B, N', D]."""
    batch, _, width = tokens.shape
    content = self.param('query_embedding', nn.initializers.normal(1.0), (self.num_queries, width))
    place = self.param('reference_points', nn.initializers.uniform(1.0), (self.num_queries, 2))
    queries = jnp.broadcast_to(content, (batch, *content.shape)).astype(self.dtype)
    mask = None if mask is None else mask[:, None, None, :]
    context = self.norm(tokens, 'token_norm')
    for i in range(1, self.num_layers + 1):
      layer = rematerialized(LearnedQueries._layer, self.remat, static_argnums=(4, 5))
      queries = layer(self, queries, context, mask, i, deterministic)
    return queries, jnp.concatenate([place, jnp.full_like(place, 0.2)], axis=-1)

  def _layer(self, queries, context, mask, i, deterministic):
    queries += self.attend(self.norm(queries, f'norm_self{i}'), None, None, f'self{i}',
                           deterministic)
    queries += self.attend(self.norm(queries, f'norm_cross{i}'), context, mask, f'cross{i}',
                           deterministic)
    return queries + self.mlp(queries, f'mlp{i}', deterministic)


class ImageQueries(nn.Module):
  """Queries from fused tokens.

  Attributes:
    num_queries: number of learned queries; 0: one query per image token.
    num_layers: decoder layers of learned queries.
    dropout_rate, remat: of the decoder layers.
  """

  num_queries: int
  num_layers: int
  dropout_rate: float = 0.0
  remat: str = 'none'

  @nn.compact
  def __call__(self, fused: Fused, *, deterministic: bool
               ) -> tuple[Float[Array, 'B N D'], Float[Array, 'N 4'], Bool[Array, 'B N'] | None]:
    """Queries of fused tokens.

    Returns:
      queries [B, N, D], their references [N, 4], and a mask bool [B, N], False for queries
      in padding, or None.
    """
    width = fused.vision.shape[-1]
    if self.num_queries:
      heads = max(width // 16, 1)
      queries, references = LearnedQueries(
          width, 2 * width, heads, width // heads, self.dropout_rate, 'xla', fused.vision.dtype,
          num_queries=self.num_queries, num_layers=self.num_layers, remat=self.remat,
          name='decoder')(
              fused.vision, fused.vision_mask, deterministic=deterministic)
      mask = None
    else:
      rows, columns = fused.grid
      skip = fused.vision.shape[1] - rows * columns  # a class token has no position
      queries, references = fused.vision[:, skip:], token_references(fused.grid)
      mask = None if fused.vision_mask is None else fused.vision_mask[:, skip:]
    queries = nn.LayerNorm(dtype=queries.dtype, name='norm')(queries)
    for i in range(0 if self.num_queries else 2):
      queries += self._near(queries, fused.grid, mask, f'conv{i + 1}')
    return queries, references, mask

  def _near(self, queries, grid, mask, name):
    """Convolves neighbouring tokens, [B, N, D]: an object's edges lie outside a single token."""
    if mask is not None:
      queries = queries * mask[..., None]
    near = nn.Conv(queries.shape[-1], (3, 3), dtype=queries.dtype, name=name)(
        queries.reshape(-1, *grid, queries.shape[-1]))
    return nn.gelu(near).reshape(queries.shape)


class QueryBoxes(nn.Module):
  """Predicts each query's box: first a proposal, then a refinement from the pixels around it.

  Like the second stage of Faster R-CNN (arXiv:1506.01497), but on pixels: tokens do not
  locate edges to the pixel, which high IoU thresholds require.

  Attributes:
    cells: rows and columns of the crop; 0: no refinement.
  """

  cells: int

  @nn.compact
  def __call__(self, queries: Float[Array, 'B N D'], references: Float[Array, 'N 4'],
               pixels: Float[Array, 'B H W 3'], extent: Int[Array, 'B 2'] | None
               ) -> tuple[Float[Array, 'B N D'], Float[Array, 'B N 4'], Float[Array, 'B N 4']]:
    """Predicts boxes from queries [B, N, D]; pixels and extent: see `glimpse`.

    Returns:
      queries [B, N, D], boxes and proposals float32 [B, N, 4], as corners in 0..1 of the input.
    """
    width, dtype = queries.shape[-1], queries.dtype
    boxes = proposals = self._box(queries, references, 'proposal')
    if self.cells:
      place = jax.lax.stop_gradient(proposals)
      crops = glimpse(pixels, place, self.cells, extent).astype(dtype)
      crops = crops.reshape(*queries.shape[:2], -1)
      normed = nn.LayerNorm(dtype=dtype, name='norm')(queries)
      queries += Mlp(2 * width, width, dtype=dtype, name='glimpse')(
          jnp.concatenate([normed, crops], axis=-1))
      boxes = self._box(queries, to_center(place), 'box')
    return queries, boxes, proposals

  def _box(self, queries, references, name):
    width = queries.shape[-1]
    change = nn.gelu(Mlp(width, width, dtype=queries.dtype, name=name)(queries))
    change = nn.Dense(4, dtype=jnp.float32, kernel_init=nn.initializers.zeros,
                      name=f'{name}_change')(change)
    # Shifts and sizes are relative to the reference box (R-CNN, arXiv:1311.2524).
    size = references[..., 2:] * jnp.exp(jnp.clip(change[..., 2:], -5, 5))
    center = references[..., :2] + change[..., :2] * references[..., 2:]
    return to_corners(jnp.concatenate([center, size], axis=-1))
