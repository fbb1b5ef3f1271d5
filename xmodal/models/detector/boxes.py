"""Overlap and formats of box arrays. Corners are (x0, y0, x1, y1) in any one unit."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def area(boxes: Float[Array, '*B 4']) -> Float[Array, '*B']:
  """Areas [...] of corners [..., 4]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_and_hull(a: Float[Array, '*#B 4'], b: Float[Array, '*#B 4']
                 ) -> tuple[Float[Array, '...'], Float[Array, '...'], Float[Array, '...']]:
  """(intersection over union, union, area of the smallest enclosing box) of corners.

  a and b [..., 4] broadcast against each other. Two boxes without area have an
  IoU of 0, and gradients are finite.
  """
  inner = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
  outer = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
  intersection = inner[..., 0] * inner[..., 1]
  union = area(a) + area(b) - intersection
  return intersection / jnp.maximum(union, 1e-9), union, outer[..., 0] * outer[..., 1]


def generalized_iou(a: Float[Array, '*#B 4'], b: Float[Array, '*#B 4']) -> Float[Array, '...']:
  """Generalised IoU (arXiv:1902.09630), -1..1, of corners [..., 4] that broadcast."""
  iou, union, hull = iou_and_hull(a, b)
  return iou - (hull - union) / jnp.maximum(hull, 1e-9)


def to_center(boxes: Float[Array, '*B 4']) -> Float[Array, '*B 4']:
  """Converts corners [..., 4] to (centre x, centre y, width, height)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def to_corners(boxes: Float[Array, '*B 4']) -> Float[Array, '*B 4']:
  """Converts (centre x, centre y, width, height) [..., 4] to corners."""
  center, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([center - half, center + half], axis=-1)
