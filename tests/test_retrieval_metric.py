"""Recall@k: the galleries of a split, ranks, ties and chance."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from xmodal.metrics.retrieval import RECALLS, make_gallery, rank, recall_scores


def directions(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_one_right_candidate_each_is_top_k_accuracy():
  """With more queries than are ranked at once."""
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 40, 700)
  candidates = directions(rng, 40, 6)
  queries = candidates[truth] + 0.5 * directions(rng, 700, 6)
  queries /= np.linalg.norm(queries, axis=1, keepdims=True)
  found = rank(queries, candidates, truth[:, None], best=3)
  scores = recall_scores(found.ranks, [1] * 700, 40)
  for k in RECALLS:
    assert scores[f'recall_at_{k}'] == pytest.approx(sklearn.metrics.top_k_accuracy_score(
        truth, queries @ candidates.T, k=k, labels=np.arange(40)))
    assert scores[f'chance_at_{k}'] == pytest.approx(k / 40)
  assert 0.2 < scores['recall_at_1'] < 0.9
  np.testing.assert_array_equal(found.best, np.argsort(-(queries @ candidates.T))[:, :3])
  np.testing.assert_allclose(found.similarity[:, 0], (queries @ candidates.T).max(1))


def vse_plus_plus(images, captions):
  """As in its evaluation.py: five captions per picture, in order; every picture five times."""
  similarity = images @ captions.T
  of_image = np.array([np.flatnonzero(np.argsort(-row) // 5 == i)[0]
                       for i, row in enumerate(similarity)])
  of_text = np.array([np.flatnonzero(np.argsort(-column) == j // 5)[0]
                      for j, column in enumerate(similarity.T)])
  return [[*(100 * np.mean(ranks < k) for k in (1, 5, 10)), np.floor(np.median(ranks)) + 1]
          for ranks in (of_image, of_text)]


def test_five_captions_a_picture_are_scored_as_coco_is():
  """One line per caption, each with its picture, which counts once."""
  rng = np.random.default_rng(1)
  seen = directions(rng, 60, 8)
  read = np.repeat(seen, 5, axis=0) + 0.8 * directions(rng, 300, 8)
  gallery = make_gallery(np.repeat(np.arange(60), 5).tolist(), [[f'text {i}'] for i in range(300)])
  assert gallery.pictures == list(range(0, 300, 5)) and len(gallery.captions) == 300
  expected = vse_plus_plus(seen, read)
  found = (recall_scores(rank(seen, read, gallery.right_captions).ranks, [5] * 60, 300),
           recall_scores(rank(read, seen, gallery.right_pictures).ranks, [1] * 300, 60))
  for ours, theirs in zip(found, expected):
    np.testing.assert_allclose(
        [*(100 * ours[f'recall_at_{k}'] for k in RECALLS), ours['median_rank']], theirs)
    assert 0 < ours['recall_at_1'] < 1


def test_a_gallery_by_hand():
  gallery = make_gallery(
      ['a', 'b', 'a', 'c', 'd'],
      [['A cat.', 'a dog'], ['a  CAT.'], ['a dog', 'a cow'], [], ['a cow', 'a cow']])
  assert gallery.picture_of == [0, 1, 0, None, 2]  # c has no caption
  assert gallery.pictures == [0, 1, 4]
  # 'a dog' of picture a stands there once; what one example repeats is counted as it is.
  assert gallery.captions == [(0, 0), (0, 1), (1, 0), (2, 1), (4, 0), (4, 1)]
  assert gallery.captions_of == [[0, 1], [2], [1, 3], [], [4, 5]]
  assert [sorted(r.tolist()) for r in gallery.right_captions] == [
      [0, 1, 2, 3, 4, 5], [0, 2], [3, 4, 5]]
  assert [r.tolist() for r in gallery.right_pictures] == [
      [0, 1], [0], [0, 1], [0, 2], [0, 2], [0, 2]]


def test_one_wording_in_two_normal_forms():
  gallery = make_gallery(['a', 'b'], [['caf\u00e9'], ['Cafe\u0301']])
  assert [r.tolist() for r in gallery.right_captions] == [[0, 1], [0, 1]]


def test_ties_do_not_flatter():
  same = np.full((30, 4), 0.5, np.float32)
  own = np.arange(30)[:, None]
  assert (rank(same, same, own).ranks == 30).all()
  # Nor do differences by rounding only.
  rounded = same * (1 + np.float32(1e-7) * np.arange(30, dtype=np.float32)[:, None] / 10)
  assert (rank(same, rounded, own).ranks == 30).all()
  # Other correct candidates do not count as rivals.
  assert (rank(same, same, [np.arange(10)] * 30).ranks == 21).all()


def test_chance_is_that_of_random_order():
  num_right = [1, 3, 7, 20]
  scores = recall_scores([5, 1, 9, 2], num_right, 20)
  for k in RECALLS:
    expected = [1 - scipy.stats.hypergeom.pmf(0, 20, r, k) for r in num_right]
    assert scores[f'chance_at_{k}'] == pytest.approx(np.mean(expected))
  assert scores['recall_at_1'] == 0.25 and scores['recall_at_5'] == 0.75
  assert scores['median_rank'] == 3
  assert recall_scores([1, 2], [1, 1], 2)['chance_at_5'] == 1  # with fewer than five candidates
