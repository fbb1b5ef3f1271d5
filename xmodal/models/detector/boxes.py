"""Boxes as arrays: how far one is from another. Corners are (x0, y0, x1, y1) in any one unit."""

import jax
import jax.numpy as jnp


def area(boxes: jax.Array) -> jax.Array:
  """Areas [...] of corners [..., 4]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_and_hull(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(intersection over union, union, area of the smallest box around both) of corners.

  a and b [..., 4] broadcast against each other; two boxes without area have an
  IoU of 0, and gradients are finite.
  """
  inner = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
  outer = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
  intersection = inner[..., 0] * inner[..., 1]
  union = area(a) + area(b) - intersection
  return intersection / jnp.maximum(union, 1e-9), union, outer[..., 0] * outer[..., 1]


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """Generalised IoU (arXiv:1902.09630), -1..1, of corners [..., 4] that broadcast."""
  iou, union, hull = iou_and_hull(a, b)
  return iou - (hull - union) / jnp.maximum(hull, 1e-9)


def to_center(boxes: jax.Array) -> jax.Array:
  """Corners [..., 4] as (centre x, centre y, width, height)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def to_corners(boxes: jax.Array) -> jax.Array:
  """(centre x, centre y, width, height) [..., 4] as corners."""
  center, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([center - half, center + half], axis=-1)
