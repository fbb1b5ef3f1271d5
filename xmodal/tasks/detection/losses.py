"""Set prediction (DETR, arXiv:2005.12872): each object is matched to one query, which is its own.

Letters: B pictures, N queries, M places for objects, K names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from xmodal.errors import UserError
from xmodal.models.detector.boxes import area, generalized_iou, iou_and_hull, to_center

# Of the matching costs and of the losses alike, as in Deformable DETR (arXiv:2010.04159).
LOSS_WEIGHTS = {'scores': 2.0, 'boxes': 5.0, 'overlap': 2.0}
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (arXiv:1708.02002), which matching costs are of
_VARIFOCAL_ALPHA = 0.75
# More than any sum of costs, and little enough for float32 to keep those apart.
_FORBIDDEN = 1e4


class Queries(NamedTuple):
  """What the queries found.

  Attributes:
    logits: float32 [B, N, K], of each query showing each name.
    boxes: float32 [B, N, 4], corners in 0..1 of the input.
    mask: bool [B, N], False for queries at padding; None: all are in the picture.
    proposals: boxes before a look at them, which learn too; None: there are none.
    places: float32 [N, 2], x and y in 0..1 of what each query stands for.
    counts: bool [K], False for names of which nothing is learned or found; None: all count.
  """

  logits: jax.Array
  boxes: jax.Array
  mask: jax.Array | None = None
  proposals: jax.Array | None = None
  places: jax.Array | None = None
  counts: jax.Array | None = None

  def masked_logits(self) -> jax.Array:
    """The logits, those of queries at padding too low to be found."""
    return self.logits if self.mask is None else jnp.where(self.mask[..., None], self.logits, -1e4)


def match(found: Queries, boxes: jax.Array, names: jax.Array) -> jax.Array:
  """The query of each object, int32 [B, M], with the least sum of costs, none used twice.

  Args:
    found: of the queries; no gradient flows from here.
    boxes: float32 [B, M, 4], corners.
    names: int32 [B, M], -1 for no object: it gets some query that is left.

  Raises:
    UserError: fewer queries than places for objects.
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
  # Places without an object cost the same everywhere; and the search must end whatever comes.
  cost = jnp.where(names[:, None] >= 0, jnp.nan_to_num(cost, nan=_FORBIDDEN, posinf=_FORBIDDEN,
                                                       neginf=-_FORBIDDEN), 0)

  def one(cost):
    queries, objects = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[1], jnp.int32).at[objects].set(queries.astype(jnp.int32))

  return jax.vmap(one)(cost)


def set_losses(found: Queries, boxes: jax.Array, names: jax.Array) -> dict[str, jax.Array]:
  """Losses of each picture, float32 [B], by term, as means over its objects (at least one).

  'scores': varifocal loss (arXiv:2008.13367) of all queries and names: the score of
  a matched query learns to be the IoU of its box, so that scores also rank boxes by
  how well they fit. 'boxes': L1 distance of centre and size. 'overlap': 1 -
  generalised IoU; both also of the proposals. And 'iou', the mean IoU of the matched,
  which is no loss. Arguments as for `match`; names that objects have must count.
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
  # A name out of range is dropped: places without an object leave no trace.
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


def box_losses(found: Queries, query: jax.Array, boxes: jax.Array, real: jax.Array
               ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """L1 distance, 1 - generalised IoU, and IoU of boxes [B, M, 4] and of queries [B, M]: [B, M].

  The first two are sums of those of the queries' boxes and of the proposals that learn the box.
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
  """How much each proposal learns of each box: [B, N, M], 1 in all of a real one.

  Not the matched alone: all that lie in a box and in no smaller one (cf. FCOS,
  arXiv:1904.01355). One in many learns little from few pictures.
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


def meant_losses(found: Queries, box: jax.Array) -> dict[str, jax.Array]:
  """Losses of each picture of the one box [B, 4] that is meant, float32 [B], by term.

  'scores': minus the log of the share (softmax over all queries, K = 1) that those
  have whose boxes show it, at an IoU of half or more, or are nearest to that.
  'boxes' and 'overlap' of the box that is nearest.
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
