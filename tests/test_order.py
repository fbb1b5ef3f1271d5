"""The records of a step: each once per epoch, the same on any hosts and after any stop."""

import collections

import numpy as np
import pytest
import scipy.stats

from xmodal.data import order


@pytest.mark.parametrize('size', [1, 2, 3, 5, 16, 17, 100, 1023, 1024, 1025, 40_000])
def test_an_epoch_holds_every_record_once(size):
  permuted = order.permute(np.arange(size), size, seed=3, epoch=2)
  assert permuted.dtype == np.int64
  np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


def test_five_records_reach_all_orders_evenly():
  counts = collections.Counter(
      tuple(order.permute(np.arange(5), 5, seed=0, epoch=epoch)) for epoch in range(6000))
  assert len(counts) == 120
  assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = [tuple(order.permute(np.arange(1000), 1000, seed, epoch))
            for seed in (0, 1) for epoch in range(3)]
  assert len(set(orders)) == 6
  # Two independent random orders agree at about one position.
  for i, one in enumerate(orders):
    assert all(np.equal(one, other).sum() < 10 for other in orders[:i])


def test_neighbours_do_not_stay_together():
  permuted = order.permute(np.arange(10_000), 10_000, seed=0, epoch=0)
  assert abs(scipy.stats.spearmanr(permuted[:-1], permuted[1:]).statistic) < 0.04
  assert abs(scipy.stats.spearmanr(permuted, np.arange(10_000)).statistic) < 0.04


def _batch(step, rows=None):
  return order.train_records(order.positions(step, 12, rows), size=50, seed=7)


@pytest.mark.parametrize('hosts', [2, 3, 4, 12])
def test_the_parts_of_the_hosts_make_the_batch_of_one_host(hosts):
  for step in (0, 3, 4, 1000):  # step 4 crosses the end of an epoch
    parts = [_batch(step, rows) for rows in np.split(np.arange(12), hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), _batch(step))


def test_a_stream_of_batches_is_the_epochs_one_after_another():
  stream = np.concatenate([_batch(step) for step in range(25)])  # 300 records: six epochs of 50
  for epoch in stream.reshape(6, 50):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(50))


def test_a_start_far_on_gives_the_same_records():
  """After a billion steps, each batch is still the right part of its epoch."""
  size, batch, step = 1_000_003, 64, 10**9
  records = order.train_records(order.positions(step, batch), size, seed=1)
  epoch, within = divmod(step * batch, size)
  expected = order.permute(np.arange(size), size, seed=1, epoch=epoch)[within:within + batch]
  np.testing.assert_array_equal(records, expected)
