"""Accuracy, precision, recall and F1 of labels; accuracy by group and a constant baseline."""

import collections
from collections.abc import Sequence

import numpy as np

from xmodal.metrics.vqa import answer_key, soft_scores, vqa_accuracy


def classification_scores(predictions: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
  """Scores of one label per example, as scikit-learn defines them with zero_division=0.

  Macro is the plain mean over every label seen in predictions or truths; micro
  counts all examples together, which for one label each equals the accuracy.

  Args:
    predictions: N labels, compared unchanged: normalise them first.
    truths: N labels.

  Returns:
    accuracy, and precision, recall and f1, each _macro and _micro, all 0..1.

  Raises:
    ValueError: the lengths differ, or there is nothing to score.
  """
  if len(predictions) != len(truths) or not truths:
    raise ValueError(f'wanted as many predictions as truths and at least one, found '
                     f'{len(predictions)} predictions and {len(truths)} truths')
  # A dict, not numpy strings: those are as wide as the longest and lose trailing NULs.
  index = {label: i for i, label in enumerate(dict.fromkeys([*truths, *predictions]))}
  predicted = np.array([index[label] for label in predictions])
  true = np.array([index[label] for label in truths])
  num_correct, num_predicted, num_true = (
      np.bincount(labels, minlength=len(index))
      for labels in (true[predicted == true], predicted, true))
  precision = _ratio(num_correct, num_predicted)
  recall = _ratio(num_correct, num_true)
  f1 = _ratio(2 * num_correct, num_predicted + num_true)
  accuracy = float(np.mean(predicted == true))
  return {
      'accuracy': accuracy,
      'precision_macro': float(precision.mean()), 'precision_micro': accuracy,
      'recall_macro': float(recall.mean()), 'recall_micro': accuracy,
      'f1_macro': float(f1.mean()), 'f1_micro': accuracy,
  }


def _ratio(part, whole):
  return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def accuracy_by_group(
    scores: Sequence[float], groups: Sequence[str]) -> dict[str, tuple[float, int]]:
  """Group -> (mean score, number of examples), groups in alphabetical order."""
  members = _members(scores, groups)
  return {group: (float(np.mean(members[group])), len(members[group])) for group in members}


def constant_baseline(truths: Sequence[Sequence[str]],
                      groups: Sequence[str]) -> dict[str, tuple[str, float]]:
  """Accuracy of the best constant answer in each group of questions.

  Args:
    truths: answers to N questions, one entry per person, at least one each.
    groups: N names, such as question types.

  Returns:
    Group -> (the constant answer with the highest VQA accuracy, that accuracy),
    groups in alphabetical order.
  """
  members = _members(truths, groups)
  return {group: _best_constant(members[group]) for group in members}


def _best_constant(truths):
  """The best of all answers; soft scores are an upper bound for every spelling of an answer."""
  bounds, spellings = collections.Counter(), collections.defaultdict(dict)
  for answers in truths:
    for key, score in soft_scores(answers).items():
      bounds[key] += score
    for answer in answers:
      spellings[answer_key(answer)][answer] = None
  best, best_total = '', -1.0
  for key, bound in bounds.most_common():
    if bound <= best_total:
      break
    for text in spellings[key]:
      total = sum(vqa_accuracy(text, answers) for answers in truths)
      if total > best_total:
        best, best_total = text, total
  return best, best_total / len(truths)


def _members(values, groups):
  if len(values) != len(groups):
    raise ValueError(f'wanted a group for each of {len(values)} examples, found {len(groups)}')
  members = collections.defaultdict(list)
  for value, group in zip(values, groups):
    members[group].append(value)
  return dict(sorted(members.items()))
