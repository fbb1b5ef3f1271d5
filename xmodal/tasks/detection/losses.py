"""Set prediction losses (DETR, arXiv:2005.12872): each object is matched to a distinct query.

Letters: B pictures, N queries, M padded objects, K names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from xmodal.errors import UserError
from xmodal.models.detector.boxes import area, generalized_iou, iou_and_hull, to_center
from xmodal.models.layout import on_each_device
from xmodal.tasks.detection.assignment import assign

# For both matching costs and losses, as in Deformable DETR (arXiv:2010.04159).
LOSS_WEIGHTS = {'scores': 2.0, 'boxes': 5.0, 'overlap': 2.0}
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (arXiv:1708.02002), used as matching cost
_VARIFOCAL_ALPHA = 0.75
# Above any sum of costs, yet small enough for float32 to distinguish costs beside it.
_FORBIDDEN = 1e4


class Queries(NamedTuple):
  """Predictions of the queries.

  Attributes:
    logits: float32 [B, N, K], of each name for each query.
    boxes: float32 [B, N, 4], corners in 0..1 of the input.
    mask: bool [B, N], False for queries in padding; None: no padding.
    proposals: float32 [B, N, 4], boxes before refinement, which have losses too; None: none.
    places: float32 [N, 2], x and y in 0..1 of each query's reference.
    counts: bool [K], False for names excluded from loss and predictions; None: all count.
  """

  logits: Float[Array, 'B N K']
  boxes: Float[Array, 'B N 4']
  mask: Bool[Array, 'B N'] | None = None
  proposals: Float[Array, 'B N 4'] | None = None
  places: Float[Array, 'N 2'] | None = None
  counts: Bool[Array, ' K'] | None = None

  def masked_logits(self) -> Float[Array, 'B N K']:
    """The logits, with a very low value for queries in padding."""
    return self.logits if self.mask is None else jnp.where(self.mask[..., None], self.logits, -1e4)


def match(found: Queries, boxes: Float[Array, 'B M 4'], names: Int[Array, 'B M']
          ) -> Int[Array, 'B M']:
  """Matches objects to distinct queries with minimal total cost: query indices int32 [B, M].

  Args:
    found: the predictions; they receive no gradient.
    boxes: float32 [B, M, 4], target corners.
    names: int32 [B, M], target names; -1 for no object, which gets any unmatched query.

  Raises:
    UserError: N is below M.
  """
  if boxes.shape[1] > found.boxes.shape[1]:
    raise UserError(f'{found.boxes.shape[1]} queries for {boxes.shape[1]} objects in a picture: '
                    'raise config.detection.queries, or config.data.image_size where each image '
                    'token is one, or lower config.detection.max_objects')
  found = jax.lax.stop_gradient(found)
  p = jax.nn.sigmoid(found.logits)
  cost_if_named = (_ALPHA * (1 - p) ** _GAMMA * -jax.nn.log_sigmoid(found.logits)
                   - (1 - _ALPHA) * p ** _GAMMA * -jax.nn.log_sigmoid(-found.logits))
  cost = LOSS_WEIGHTS['scores'] * jnp.take_along_axis(
      cost_if_named, jnp.maximum(names, 0)[:, None], axis=-1)  # [B, N, M]
  ours, theirs = found.boxes[:, :, None], boxes[:, None]
  cost += LOSS_WEIGHTS['boxes'] * jnp.abs(to_center(ours) - to_center(theirs)).sum(-1)
  cost -= LOSS_WEIGHTS['overlap'] * generalized_iou(ours, theirs)
  if found.mask is not None:
    cost += jnp.where(found.mask, 0, _FORBIDDEN)[..., None]
  # Costs must be finite for the search to end.
  cost = jnp.nan_to_num(cost, nan=_FORBIDDEN, posinf=_FORBIDDEN, neginf=-_FORBIDDEN)
  return on_each_device(jax.vmap(assign), cost.swapaxes(1, 2), names >= 0)


def set_losses(found: Queries, boxes: Float[Array, 'B M 4'], names: Int[Array, 'B M']
               ) -> dict[str, Float[Array, ' B']]:
  """Per-picture losses by term, float32 [B], divided by the number of objects (at least 1).

  'scores': varifocal loss (arXiv:2008.13367) of all queries and names. The target of
  a matched query's score is the IoU of its box, so that scores also rank boxes by
  their fit. 'boxes': L1 distance of centre and size. 'overlap': 1 - generalised IoU.
  Both include the proposals. 'iou': mean IoU of matched boxes, a metric, not a loss.
  Arguments as for `match`; names of objects must count.
  """
  num_names = found.logits.shape[-1]
  query = match(found, boxes, names)
  real = names >= 0
  if found.mask is not None:
    real &= jnp.take_along_axis(found.mask, query, axis=1)
  count = jnp.maximum(real.sum(-1), 1)

  def mean(values):
    return jnp.where(real, values, 0).sum(-1) / count

  distance, overlap, iou = box_losses(found, query, boxes, real)
  rows = jnp.arange(len(query))[:, None]
  # An index out of range is dropped: padded objects write nothing.
  place = (rows, query, jnp.where(real, names, num_names))
  is_match = jnp.zeros(found.logits.shape, bool).at[place].set(True, mode='drop')
  target = jnp.zeros(found.logits.shape).at[place].set(jax.lax.stop_gradient(iou), mode='drop')
  p = jax.lax.stop_gradient(jax.nn.sigmoid(found.logits))
  scores = (jnp.where(is_match, target, _VARIFOCAL_ALPHA * p**_GAMMA)
            * optax.sigmoid_binary_cross_entropy(found.logits, target))
  if found.mask is not None:
    scores = jnp.where(found.mask[..., None], scores, 0)
  if found.counts is not None:
    scores = jnp.where(found.counts, scores, 0)
  return {'scores': scores.sum((1, 2)) / count, 'boxes': mean(distance), 'overlap': mean(overlap),
          'iou': mean(iou)}


def box_losses(found: Queries, query: Int[Array, 'B M'], boxes: Float[Array, 'B M 4'],
               real: Bool[Array, 'B M']
               ) -> tuple[Float[Array, 'B M'], Float[Array, 'B M'], Float[Array, 'B M']]:
  """L1 distance, 1 - generalised IoU, and IoU of matched boxes, each [B, M].

  The first two are sums over the matched query's box and the proposals assigned to the target.

  Args:
    found: the predictions.
    query: int32 [B, M], the matched query of each target.
    boxes: float32 [B, M, 4], target corners.
    real: bool [B, M], False for padded objects.
  """
  matched = jnp.take_along_axis(found.boxes, query[..., None], axis=1)
  distance, overlap = _distance(matched, boxes), 1 - generalized_iou(matched, boxes)
  if found.proposals is not None:
    ours, theirs = found.proposals[:, :, None], boxes[:, None]
    share = _shares(found, query, boxes, real)
    distance += (share * _distance(ours, theirs)).sum(1)
    overlap += (share * (1 - generalized_iou(ours, theirs))).sum(1)
  return distance, overlap, iou_and_hull(matched, boxes)[0]


def _distance(a, b):
  return jnp.abs(to_center(a) - to_center(b)).sum(-1)


def _shares(found, query, boxes, real):
  """Weight of each proposal in the loss of each box: [B, N, M], with sum 1 for a real box.

  Besides the matched proposal, all proposals inside a box and no smaller one count (cf. FCOS,
  arXiv:1904.01355). The matched proposal alone would learn too little from few pictures.
  """
  x, y = jnp.moveaxis(found.places[:, None], -1, 0)  # [N, 1]
  low_x, low_y, high_x, high_y = jnp.moveaxis(boxes[:, None], -1, 0)  # [B, 1, M]
  inside = (low_x < x) & (x < high_x) & (low_y < y) & (y < high_y) & real[:, None]
  if found.mask is not None:
    inside &= found.mask[..., None]
  size = jnp.where(inside, area(boxes)[:, None], jnp.inf)
  inside &= size == size.min(-1, keepdims=True)
  matched = (jnp.arange(found.boxes.shape[1])[:, None] == query[:, None]) & real[:, None]
  learns = matched | (inside & ~matched.any(-1, keepdims=True))
  return learns / jnp.maximum(learns.sum(1, keepdims=True), 1)


def expression_losses(found: Queries, box: Float[Array, 'B 4']) -> dict[str, Float[Array, ' B']]:
  """Per-picture losses of a referring expression's target box [B, 4], by term, float32 [B].

  'scores': minus the log of the probability (softmax over all queries, K = 1) of the
  queries whose boxes have an IoU of 0.5 or more with the target, or else the highest IoU.
  'boxes' and 'overlap' are of the box with the highest IoU.
  """
  iou = jax.lax.stop_gradient(iou_and_hull(found.boxes, box[:, None])[0])
  if found.mask is not None:
    iou = jnp.where(found.mask, iou, -1)
  right = iou >= jnp.minimum(iou.max(-1, keepdims=True), 0.5)
  share = jax.nn.log_softmax(found.masked_logits()[..., 0])
  distance, overlap, _ = box_losses(found, iou.argmax(-1)[:, None], box[:, None],
                                    jnp.ones((len(box), 1), bool))
  return {'scores': -jax.nn.logsumexp(jnp.where(right, share, -1e4), axis=-1),
          'boxes': distance[:, 0], 'overlap': overlap[:, 0]}
