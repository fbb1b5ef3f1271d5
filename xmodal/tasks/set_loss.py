"""Set prediction (DETR, arXiv:2005.12872): each object is matched to one query, and the query to it.

Letters: B pictures, N queries, M places for objects, K names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from xmodal.errors import UserError
from xmodal.models.boxes import generalized_iou, iou_and_hull, to_center

# Of the matching costs and of the losses alike, as in Deformable DETR (arXiv:2010.04159).
LOSS_WEIGHTS = {'scores': 2.0, 'boxes': 5.0, 'overlap': 2.0}
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (arXiv:1708.02002)
# More than any sum of costs, and little enough for float32 to keep those apart.
_FORBIDDEN = 1e4


class Queries(NamedTuple):
  """What the queries found.

  Attributes:
    logits: float32 [B, N, K], of each query showing each name.
    boxes: float32 [B, N, 4], corners in 0..1 of the input.
    mask: bool [B, N], False for queries at padding; None: all are in the picture.
  """

  logits: jax.Array
  boxes: jax.Array
  mask: jax.Array | None = None

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
    raise UserError(f'{found.boxes.shape[1]} queries for {boxes.shape[1]} objects in a picture: raise '
                    'config.detection.queries, or config.data.image_size where each image token is '
                    'one, or lower config.detection.max_objects')
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

  'scores': focal loss of all queries and names. 'boxes': L1 distance of centre
  and size. 'overlap': 1 - generalised IoU. And 'iou', the mean IoU of the
  matched, which is no loss. Arguments as for `match`.
  """
  num_names = found.logits.shape[-1]
  query = match(found, boxes, names)
  real = names >= 0
  if found.mask is not None:
    real &= jnp.take_along_axis(found.mask, query, axis=1)
  count = jnp.maximum(real.sum(-1), 1)

  rows = jnp.arange(len(query))[:, None]
  # A name out of range is dropped: places without an object leave no trace.
  targets = jnp.zeros(found.logits.shape).at[
      rows, query, jnp.where(real, names, num_names)].set(1, mode='drop')
  focal = optax.sigmoid_focal_loss(found.logits, targets, alpha=_ALPHA, gamma=_GAMMA)
  if found.mask is not None:
    focal = jnp.where(found.mask[..., None], focal, 0)

  matched = jnp.take_along_axis(found.boxes, query[..., None], axis=1)
  distance = jnp.abs(to_center(matched) - to_center(boxes)).sum(-1)

  def mean(values):
    return jnp.where(real, values, 0).sum(-1) / count

  return {'scores': focal.sum((1, 2)) / count, 'boxes': mean(distance),
          'overlap': mean(1 - generalized_iou(matched, boxes)),
          'iou': mean(iou_and_hull(matched, boxes)[0])}
