"""Objects are assigned to queries as by scipy."""

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from xmodal.tasks.detection.assignment import assign

ASSIGN = jax.jit(jax.vmap(assign))


@pytest.mark.parametrize('scale, rounded, forbidden', [
    (1, False, False), (10, False, False), (2, True, False), (10, False, True)])
@pytest.mark.parametrize('rows, columns', [(1, 1), (1, 7), (12, 12), (12, 30), (30, 31)])
def test_real_rows_cost_as_little_as_possible(rows, columns, scale, rounded, forbidden):
  rng = np.random.default_rng(0)
  costs = scale * rng.normal(size=(12, rows, columns)).astype(np.float32)
  if rounded:  # many equal costs
    costs = np.round(costs)
  if forbidden:
    costs[:, :, ::3] += 1e4
  real = rng.random((12, rows)) < np.linspace(0, 1, 12)[:, None]
  assert not real[0].any() and real[-1].all()
  for cost, is_real, columns_of in zip(costs, real, np.asarray(ASSIGN(costs, real)), strict=True):
    assert len({*columns_of.tolist()} & {*range(columns)}) == rows
    best = cost[is_real][linear_sum_assignment(cost[is_real])].sum()
    assert cost[is_real, columns_of[is_real]].sum() == pytest.approx(best, rel=1e-6, abs=1e-4)
