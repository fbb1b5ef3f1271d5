"""What looks for objects: the image tokens themselves, or learned queries that look at them.

Both give, for image tokens [B, N', D] on a grid, queries [B, N, D] and a
reference box for each, float32 [N, 4]: centre x, centre y, width and height in
0..1 of the input, from which a head predicts the difference.
"""

from flax import linen as nn
import jax.numpy as jnp

from xmodal.models.cross_modal import Sublayers


def token_references(grid: tuple[int, int], cells: float = 2.0):
  """A box `cells` wide and high around the middle of each token, [rows * columns, 4]."""
  rows, columns = grid
  y, x = jnp.meshgrid((jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns,
                      indexing='ij')
  size = jnp.full(x.shape, cells)
  return jnp.stack([x, y, size / columns, size / rows], axis=-1).reshape(-1, 4)


class LearnedQueries(Sublayers):
  """Learned queries that look at each other and at the tokens, layer by layer (arXiv:2005.12872).

  Attributes beside the sizes (see CrossModal):
    num_queries: N.
    num_layers: of the decoder.
  """

  num_queries: int = 100
  num_layers: int = 1

  @nn.compact
  def __call__(self, tokens, mask, *, deterministic):
    """tokens [B, N', D], mask bool [B, N'] or None -> queries [B, N, D], references [N, 4]."""
    batch, _, width = tokens.shape
    content = self.param('query_embedding', nn.initializers.normal(1.0), (self.num_queries, width))
    place = self.param('reference_points', nn.initializers.uniform(1.0), (self.num_queries, 2))
    queries = jnp.broadcast_to(content, (batch, *content.shape)).astype(self.dtype)
    mask = None if mask is None else mask[:, None, None, :]
    context = self.norm(tokens, 'token_norm')
    for i in range(1, self.num_layers + 1):
      queries += self.attend(self.norm(queries, f'norm_self{i}'), None, None, f'self{i}',
                             deterministic)
      queries += self.attend(self.norm(queries, f'norm_cross{i}'), context, mask, f'cross{i}',
                             deterministic)
      queries += self.mlp(queries, f'mlp{i}', deterministic)
    return queries, jnp.concatenate([place, jnp.full_like(place, 0.2)], axis=-1)
