"""Errors of predicted numbers, overall and by group."""

import collections
from collections.abc import Sequence

import numpy as np


def regression_scores(predictions: Sequence[float], truths: Sequence[float]) -> dict[str, float]:
  """Scores of N predicted numbers; MAE, RMSE and R2 as in scikit-learn.

  Returns:
    MAE and RMSE, in the numbers' own unit; R2 (1 - squared error / variance of the
    truths; missing if all truths are equal); within_10% and within_0.5, the shares
    with an error of at most a tenth of the truth, or at most 0.5; constant_MAE, the
    MAE of always predicting the truths' mean.

  Raises:
    ValueError: the lengths differ, or there is nothing to score.
  """
  if len(predictions) != len(truths) or not len(truths):
    raise ValueError(f'wanted as many predictions as truths and at least one, found '
                     f'{len(predictions)} predictions and {len(truths)} truths')
  predictions, truths = np.asarray(predictions, np.float64), np.asarray(truths, np.float64)
  error, spread = np.abs(predictions - truths), np.abs(truths - truths.mean())
  scores = {
      'MAE': error.mean(), 'RMSE': np.sqrt((error ** 2).mean()),
      'within_10%': (error <= 0.1 * np.abs(truths)).mean(), 'within_0.5': (error <= 0.5).mean(),
      'constant_MAE': spread.mean()}
  if np.ptp(truths):
    scores['R2'] = 1 - (error ** 2).sum() / (spread ** 2).sum()
  return {name: float(score) for name, score in scores.items()}


def scores_by_group(predictions: Sequence[float], truths: Sequence[float],
                    groups: Sequence[str]) -> dict[str, dict[str, float]]:
  """Group -> regression_scores and 'examples', groups in alphabetical order."""
  members = collections.defaultdict(list)
  for group, *pair in zip(groups, predictions, truths, strict=True):
    members[group].append(pair)
  return {group: {**regression_scores(*zip(*pairs)), 'examples': len(pairs)}
          for group, pairs in sorted(members.items())}
