"""The detection head."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from xmodal.models.detector.expressions import ExpressionScorer
from xmodal.models.detector.queries import ImageQueries, QueryBoxes
from xmodal.tasks.detection.losses import Queries

_MOST_FOUND = 100  # detections per picture, COCO's limit


class DetectionHead(nn.Module):
  """Boxes and scores of queries.

  Attributes:
    num_queries: number of learned queries; 0: one query per image token.
    num_layers: decoder layers of learned queries.
    glimpse: side, in cells, of the crop around a query's box that refines it; 0: no refinement.
    expressions: whether the head also scores referring expressions.
    pad_id: id of the pad token.
  """

  num_queries: int
  num_layers: int
  glimpse: int
  expressions: bool
  pad_id: int

  @nn.compact
  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> dict[str, Queries]:
    """Returns {'names': Queries, 'expression': Queries with K = 1 if expressions are on}."""
    empty_text = jnp.full((features['placement'].shape[0], 1), self.pad_id, jnp.int32)
    queries, references, mask = ImageQueries(
        self.num_queries, self.num_layers, **towers.layer_options, name='queries')(
            towers.fused(empty_text), deterministic=deterministic)
    queries, boxes, proposals = QueryBoxes(self.glimpse, name='query_boxes')(
        queries, references, *towers.pixels())
    found = {'boxes': boxes, 'mask': mask, 'proposals': proposals, 'places': references[:, :2]}
    vocabulary = features['vocabulary']
    outputs = {'names': Queries(self._name_logits(towers.names(vocabulary), queries), **found,
                                counts=vocabulary.counts)}
    if self.expressions:
      text = towers.text(features['expression']['tokens'])
      words = towers.align(towers.vision(), text)[1]
      scorer = ExpressionScorer(name='expression')
      logits = scorer(queries, words, text.mask, boxes, mask)[..., None]
      outputs['expression'] = Queries(logits, **found)
    return outputs

  def _name_logits(self, names, hidden):
    """Logits of each query [B, N, D] for each name [K, D]: float32 [B, N, K] (cf.
    arXiv:2205.06230)."""
    projected = nn.Dense(names.shape[-1], dtype=hidden.dtype, name='name_projection')(hidden)
    # Objectness does not depend on names, so it also works for unseen names.
    objectness = nn.Dense(1, dtype=jnp.float32, name='objectness',
                     bias_init=nn.initializers.constant(-4.0))(hidden)
    scale = jnp.exp(self.param('log_scale', nn.initializers.constant(1.0), ()))
    logits = jnp.einsum('bnd,kd->bnk', projected, names, preferred_element_type=jnp.float32)
    return logits * (scale * projected.shape[-1] ** -0.5) + objectness

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the best (box, name) pairs, [B, 100], and the best box of the expression, [B].

    Scores are probabilities, or -1 for names that do not count.
    """
    outputs = self(towers, features, deterministic=True)
    scores = jax.nn.sigmoid(outputs['names'].masked_logits())
    if (counts := outputs['names'].counts) is not None:
      scores = jnp.where(counts, scores, -1)
    flat = scores.reshape(scores.shape[0], -1)
    score, pair = jax.lax.top_k(flat, min(_MOST_FOUND, flat.shape[1]))
    query, name = jnp.divmod(pair, scores.shape[-1])
    boxes = jnp.take_along_axis(outputs['names'].boxes, query[..., None], axis=1)
    arrays = {'placement': features['placement'], 'score': score, 'name': name, 'boxes': boxes}
    if 'expression' in outputs:
      scores = jax.nn.softmax(outputs['expression'].masked_logits()[..., 0])
      best = scores.argmax(-1)[:, None]
      arrays |= {'expression_score': jnp.take_along_axis(scores, best, axis=1)[:, 0],
                 'expression_box': jnp.take_along_axis(
                     outputs['expression'].boxes, best[..., None], axis=1)[:, 0]}
    return arrays
