"""Matching and losses of set prediction, against scipy's and transformers' (Deformable DETR,
RT-DETR)."""

import jax
import numpy as np
import pytest
import torch
from transformers import RTDetrConfig
from transformers.loss import loss_deformable_detr as theirs
from transformers.loss.loss_for_object_detection import generalized_box_iou
from transformers.loss.loss_rt_detr import RTDetrLoss

from xmodal.errors import UserError
from xmodal.models.detector import boxes as box_maths
from xmodal.tasks.detection.losses import (
    LOSS_WEIGHTS,
    Queries,
    expression_losses,
    match,
    set_losses,
)

B, N, M, K = 6, 12, 5, 3
COUNTS = (5, 3, 0, 1, 5, 2)
losses = jax.jit(set_losses)
matched = jax.jit(match)


def corners(rng, *shape):
  low, size = rng.random((*shape, 2)) * 0.6, 0.05 + rng.random((*shape, 2)) * 0.35
  return np.concatenate([low, low + size], axis=-1).astype(np.float32)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  names = rng.integers(0, K, (B, M)).astype(np.int32)
  names[np.arange(M) >= np.array(COUNTS)[:, None]] = -1
  logits = rng.normal(size=(B, N, K)).astype(np.float32) * 2
  return Queries(logits, corners(rng, B, N)), corners(rng, B, M), names


def as_theirs(found, boxes, names):
  """(outputs, targets) for transformers: centre boxes, padding left out."""
  outputs = {'logits': torch.tensor(found.logits),
             'pred_boxes': torch.tensor(np.asarray(box_maths.to_center(found.boxes)))}
  targets = [{'class_labels': torch.tensor(n[n >= 0].astype(np.int64)),
              'boxes': torch.tensor(np.asarray(box_maths.to_center(b[n >= 0])))}
             for b, n in zip(boxes, names)]
  return outputs, targets


def matcher():
  return theirs.DeformableDetrHungarianMatcher(
      class_cost=LOSS_WEIGHTS['scores'], bbox_cost=LOSS_WEIGHTS['boxes'],
      giou_cost=LOSS_WEIGHTS['overlap'])


def test_generalized_iou_equals_transformers():
  rng = np.random.default_rng(1)
  a, b = corners(rng, 40), corners(rng, 30)
  ours = box_maths.generalized_iou(a[:, None], b[None])
  np.testing.assert_allclose(ours, generalized_box_iou(torch.tensor(a), torch.tensor(b)), atol=1e-5)
  np.testing.assert_allclose(box_maths.to_corners(box_maths.to_center(a)), a, atol=1e-6)


def test_every_object_is_matched_as_transformers_and_scipy_match_it(case):
  query = np.asarray(matched(*case))
  outputs, targets = as_theirs(*case)
  for b, (queries, objects) in enumerate(matcher()(outputs, targets)):
    assert query[b, objects.numpy()].tolist() == queries.tolist()
    assert len(set(query[b])) == M


def test_losses_equal_transformers(case):
  outputs, targets = as_theirs(*case)
  of_boxes = theirs.DeformableDetrImageLoss(matcher(), num_classes=K, focal_alpha=0.25,
                                            losses=['boxes'])
  expected = of_boxes(outputs, targets) | RTDetrLoss(RTDetrConfig(
      num_labels=K, focal_loss_alpha=0.75, focal_loss_gamma=2.0)).loss_labels_vfl(
          outputs, targets, matcher()(outputs, targets), sum(COUNTS))
  ours, count = losses(*case), np.array(COUNTS)
  # transformers sums over the batch and divides by all its objects.
  for term, name, weight in (('scores', 'loss_vfl', np.maximum(count, 1)),
                             ('boxes', 'loss_bbox', count), ('overlap', 'loss_giou', count)):
    np.testing.assert_allclose((ours[term] * weight).sum() / count.sum(), expected[name].item(),
                               rtol=2e-5, err_msg=term)


def test_proposals_learn_the_boxes_of_what_their_queries_are_matched_to(case):
  found, boxes, names = case
  outside = np.full((N, 2), 2.0, np.float32)
  without = losses(*case)
  alike = losses(found._replace(proposals=found.boxes, places=outside), boxes, names)
  for term in ('boxes', 'overlap'):
    np.testing.assert_allclose(alike[term], 2 * without[term], rtol=1e-6)
  for term in ('scores', 'iou'):
    np.testing.assert_allclose(alike[term], without[term])


def test_a_proposal_that_is_not_matched_learns_the_smallest_box_that_it_lies_in():
  large, small = [0.0, 0.0, 0.8, 0.8], [0.5, 0.5, 0.7, 0.7]
  boxes = np.float32([[large, small, [0, 0, 1, 1]]])
  names = np.int32([[0, 0, -1]])  # the last is no object
  # Inside the large box, in both, in both, in none; the first two are matched.
  places = np.float32([[0.2, 0.2], [0.6, 0.6], [0.6, 0.55], [0.9, 0.9]])
  proposals = np.float32([[large, small, [0.5, 0.5, 0.7, 0.8], large]])
  found = Queries(np.zeros((1, 4, 1), np.float32),
                  np.float32([[large, small, [0, 0.9, 0.1, 1], small]]),
                  proposals=proposals, places=places)
  assert matched(found, boxes, names)[0, :2].tolist() == [0, 1]

  def distance(proposals):
    return losses(found._replace(proposals=proposals), boxes, names)['boxes'].sum()

  # One of the two trained on the small box is 0.1 too tall, its centre off by 0.05.
  np.testing.assert_allclose(distance(proposals), (0.1 + 0.05) / 2 / 2, rtol=1e-5)
  learns = np.abs(np.asarray(jax.grad(distance)(proposals + 0.01))).sum(-1)[0] > 0
  assert learns.tolist() == [True, True, True, False]
  hidden = found._replace(mask=np.array([[True, True, False, True]]))
  assert losses(hidden, boxes, names)['boxes'] < 1e-6


def test_any_query_that_shows_the_thing_meant_is_right():
  box = np.float32([[0.2, 0.2, 0.6, 0.6]])
  near, far = [0.2, 0.2, 0.6, 0.5], [0.7, 0.7, 0.9, 0.9]
  found = Queries(np.float32([[[2], [1], [0], [3]]]), np.float32([[far, near, box[0], far]]))
  share = torch.softmax(torch.tensor([2.0, 1, 0, 3]), 0)
  terms = expression_losses(found, box)
  np.testing.assert_allclose(terms['scores'], -np.log(float(share[1] + share[2])), rtol=1e-5)
  assert abs(terms['boxes'][0]) < 1e-6  # of the nearest query
  # If no query covers it, the nearest one is trained on it.
  gone = found._replace(mask=np.array([[True, False, False, True]]))
  overlapping = gone._replace(boxes=np.float32([[[0.5, 0.5, 0.9, 0.9], near, box[0], far]]))
  np.testing.assert_allclose(expression_losses(overlapping, box)['scores'],
                             -np.log(float(torch.softmax(torch.tensor([2.0, 3]), 0)[0])), rtol=1e-5)


def test_queries_at_padding_find_nothing_and_learn_nothing(case):
  found, boxes, names = case
  mask = np.arange(N) < 8
  masked = found._replace(mask=np.broadcast_to(mask, (B, N)))
  assert np.asarray(matched(masked, boxes, names))[names >= 0].max() < 8
  alone = Queries(found.logits[:, :8], found.boxes[:, :8])
  for term, value in losses(masked, boxes, names).items():
    np.testing.assert_allclose(value, losses(alone, boxes, names)[term], rtol=1e-5, err_msg=term)
  gradient = jax.grad(lambda logits, boxes_: sum(
      v.sum() for v in set_losses(masked._replace(logits=logits, boxes=boxes_), boxes,
                                  names).values()), (0, 1))(found.logits, found.boxes)
  assert all(np.abs(g[:, 8:]).max() == 0 and np.abs(g[:, :8]).max() > 0 for g in gradient)


def test_names_left_out_are_as_if_they_were_not_there(case):
  found, boxes, names = case
  logits = np.concatenate([found.logits, found.logits[:, :, ::-1] + 5], axis=-1)
  counts = np.arange(2 * K) < K
  more = found._replace(logits=logits, counts=counts)
  for term, value in losses(more, boxes, names).items():
    np.testing.assert_allclose(value, losses(found, boxes, names)[term], rtol=1e-6, err_msg=term)
  gradient = jax.grad(lambda logits: sum(v.sum() for v in set_losses(
      more._replace(logits=logits), boxes, names).values()))(logits)
  assert np.abs(gradient[..., K:]).max() == 0 < np.abs(gradient[..., :K]).max()


def test_a_picture_without_objects_teaches_that_there_are_none(case):
  found, boxes, _ = case
  names = np.full((B, M), -1, np.int32)
  terms = losses(found, boxes, names)
  assert (np.asarray(terms['scores']) > 0).all()
  assert np.abs(terms['boxes']).max() == np.abs(terms['overlap']).max() == 0


def test_numbers_that_are_no_numbers_end_the_search(case):
  found, boxes, names = case
  broken = found._replace(logits=np.full_like(found.logits, np.nan))
  assert len(set(np.asarray(matched(broken, boxes, names))[0])) == M


def test_more_objects_than_queries_are_refused(case):
  found, boxes, names = case
  with pytest.raises(UserError, match='4 queries for 5 objects'):
    match(Queries(found.logits[:, :4], found.boxes[:, :4]), boxes, names)
