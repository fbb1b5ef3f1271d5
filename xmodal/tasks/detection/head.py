"""The part of the model that detection has of its own."""

from collections.abc import Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp

from xmodal.models.detector.expressions import MeantQuery
from xmodal.models.detector.queries import ImageQueries, QueryBoxes
from xmodal.tasks.detection.losses import Queries

_MOST_FOUND = 100  # boxes of one picture that are kept, as many as COCO counts


class DetectionHead(nn.Module):
  """Boxes and scores of queries.

  Attributes:
    num_queries: of learned queries; 0: one query for each image token.
    num_layers: of the decoder of learned queries.
    glimpse: cells across in which a query looks at the pixels around its box; 0: it does not.
    expressions: whether expressions are read too.
    pad_id: token number that is no text.
  """

  num_queries: int
  num_layers: int
  glimpse: int
  expressions: bool
  pad_id: int

  @nn.compact
  def __call__(self, towers, features: Mapping[str, jax.Array], *, deterministic: bool):
    """Returns {'names': Queries, 'expression': Queries with K = 1}, the latter if there are any."""
    nothing = jnp.full((features['placement'].shape[0], 1), self.pad_id, jnp.int32)
    queries, references, mask = ImageQueries(
        self.num_queries, self.num_layers, **towers.layer_options, name='queries')(
            towers.fused(nothing), deterministic=deterministic)
    queries, boxes, proposals = QueryBoxes(self.glimpse, name='query_boxes')(
        queries, references, *towers.pixels())
    found = {'boxes': boxes, 'mask': mask, 'proposals': proposals, 'places': references[:, :2]}
    asked = features['vocabulary']
    outputs = {'names': Queries(self._name_logits(towers.names(asked), queries), **found,
                                counts=asked.counts)}
    if self.expressions:
      text = towers.text(features['expression']['tokens'])
      words = towers.align(towers.vision(), text)[1]
      logits = MeantQuery(name='expression')(queries, words, text.mask, boxes, mask)[..., None]
      outputs['expression'] = Queries(logits, **found)
    return outputs

  def _name_logits(self, names, hidden):
    """Match of each query [B, N, D] with each name [K, D]: float32 [B, N, K] (cf.
    arXiv:2205.06230)."""
    seen = nn.Dense(names.shape[-1], dtype=hidden.dtype, name='name_projection')(hidden)
    # That a query shows anything at all does not hang on names, so unseen ones have it too.
    thing = nn.Dense(1, dtype=jnp.float32, name='objectness',
                     bias_init=nn.initializers.constant(-4.0))(hidden)
    scale = jnp.exp(self.param('log_scale', nn.initializers.constant(1.0), ()))
    logits = jnp.einsum('bnd,kd->bnk', seen, names, preferred_element_type=jnp.float32)
    return logits * (scale * seen.shape[-1] ** -0.5) + thing

  def predict(self, towers, features: Mapping[str, jax.Array]):
    """Returns the best (box, name) pairs, [B, 100], and the best box for the expression, [B].

    Scores are probabilities, and -1 for what is no name.
    """
    outputs = self(towers, features, deterministic=True)
    scores = jax.nn.sigmoid(outputs['names'].masked_logits())
    if (counts := outputs['names'].counts) is not None:
      scores = jnp.where(counts, scores, -1)
    flat = scores.reshape(len(scores), -1)
    score, pair = jax.lax.top_k(flat, min(_MOST_FOUND, flat.shape[1]))
    query, name = jnp.divmod(pair, scores.shape[-1])
    boxes = jnp.take_along_axis(outputs['names'].boxes, query[..., None], axis=1)
    arrays = {'placement': features['placement'], 'score': score, 'name': name, 'boxes': boxes}
    if 'expression' in outputs:
      scores = jax.nn.softmax(outputs['expression'].masked_logits()[..., 0])
      best = scores.argmax(-1)[:, None]
      arrays |= {'meant_score': jnp.take_along_axis(scores, best, axis=1)[:, 0],
                 'meant_box': jnp.take_along_axis(
                     outputs['expression'].boxes, best[..., None], axis=1)[:, 0]}
    return arrays
