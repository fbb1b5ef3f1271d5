"""VQA accuracy against the published evaluation code, label scores against scikit-learn."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from xmodal.metrics.classification import (
  accuracy_by_group,
  classification_scores,
  constant_baseline,
)
from xmodal.metrics.vqa import normalize_answer, soft_scores, vqa_accuracy

# What processPunctuation and processDigitArticle of the published vqaEval.py
# (the copy in salesforce-lavis 1.0.2) return for these texts.
_OFFICIAL_FORMS = [
    ('Yes', 'yes'),
    ('yes.', 'yes'),
    ('The  cat', 'cat'),
    ('a cat and an owl', 'cat and owl'),
    ('A', ''),
    ('None', '0'),
    ('twenty one', 'twenty 1'),
    ('dont know', "don't know"),
    ("don't", "don't"),
    ('Im', 'im'),
    ("somebody'd", 'somebodyd'),
    ("she'dve", "she'd've"),
    ("yall'd've", "y'all'd've"),
    ('oclock', "o'clock"),
    ('Ten.', '10'),
    ('t-shirt', 't shirt'),
    ('black/white', 'black white'),
    ('black / white', 'black white'),
    ('red, white', 'red white'),
    ('red,white', 'red white'),
    ('1,000', '1000'),
    ('1,000-2,000 (a/b)', '10002000 ab'),
    ('2.5', '2.5'),
    ('.5', '.5'),
    ('3.', '3'),
    ('u.s.a.', 'usa'),
    ('7.30 p.m.', '7.30 pm'),
    ('10:30', '10:30'),
    ('$5', '$5'),
    ('50%', '50%'),
    ('what?!', 'what'),
    ('wi-fi - on', 'wifi on'),
    ('yes\nno', 'yes no'),
    ('\tyes\n', 'yes'),
    ('"stop"', 'stop'),
    ('(left)', 'left'),
    ("men's", "men's"),
    ('over_the_hill', 'over hill'),
    ('x........................................', 'x........'),
    ('', ''),
    ('a the an', ''),
    ('zero-one', '0 1'),
    ('Écru', 'écru'),
    ('half-a-dozen', 'half dozen'),
    ('none of the above', '0 of above'),
    ("rock n' roll", "rock n' roll"),
    ('one.two', 'onetwo'),
    ('@home', 'home'),
    ('`', ''),
    ('1,a', '1'),
    ('hi ,there-you', 'hi there you'),
]


@pytest.mark.parametrize('text, form', _OFFICIAL_FORMS)
def test_normal_form_is_the_official_one(text, form):
  assert normalize_answer(text) == form


# (prediction, the ten answers, accuracy), worked by hand from vqaEval.py.
_TEN = [
    ('yes', ['yes'] * 10, 1.0),
    ('no', ['yes'] * 10, 0.0),
    # One of ten: nine subsets have one match, one subset has none: 9 * 1/3 / 10.
    ('no', ['no'] + ['yes'] * 9, 0.3),
    # Two: eight subsets have two matches, two have one: (8 * 2/3 + 2 * 1/3) / 10.
    ('no', ['no'] * 2 + ['yes'] * 8, 0.6),
    # Three: seven have three, three have two: (7 + 3 * 2/3) / 10.
    ('no', ['no'] * 3 + ['yes'] * 7, 0.9),
    ('no', ['no'] * 4 + ['yes'] * 6, 1.0),
    # The answers differ: both sides are normalised.
    ('Two.', ['2'] * 5 + ['two'] * 4 + ['3'], 1.0),
    ('the t-shirt', ['t shirt'] * 2 + ['T-shirt'] + ['shirt'] * 7, 0.9),
    # They differ only in surrounding white space: neither side is normalised.
    ('2', ['two'] * 10, 0.0),
    ('two', ['two'] * 9 + ['two\n'], 1.0),
    ('Yes', ['yes'] * 10, 0.0),
    ('t-shirt', ['t-shirt'] * 10, 1.0),
    ('t shirt', ['t-shirt'] * 10, 0.0),
    # They differ only in spelling: both sides are normalised.
    ('YES!', ['yes'] * 9 + ['Yes'], 1.0),
    ('', ['a'] * 5 + ['b'] * 5, 1.0),
]


@pytest.mark.parametrize('prediction, answers, accuracy', _TEN)
def test_accuracy_of_ten_answers_is_the_official_one(prediction, answers, accuracy):
  assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize('prediction, answers, accuracy', [
    ('Yes.', ['yes'], 1.0), ('no', ['yes'], 0.0), ('two', ['2'], 1.0),
    ('B', ['b'], 1.0), ('a', ['A'], 1.0), ('', ['A'], 0.0), ('the', ['A'], 0.0),
    ('yes', ['yes', 'yes'], 1.0), ('yes', ['yes', 'no'], 0.5),
    ('yes', ['yes', 'no', 'no'], 1 / 3), ('yes', ['yes', 'yes', 'yes'], 1.0),
    ('yes', ['yes'] * 4, 1.0), ('yes', ['yes'] * 3 + ['no'], 0.75),
])
def test_accuracy_of_fewer_answers(prediction, answers, accuracy):
  assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy, abs=1e-12)


def test_accuracy_needs_an_answer():
  with pytest.raises(ValueError, match='at least one answer'):
    vqa_accuracy('yes', [])


def test_soft_scores_are_the_accuracies_of_giving_them():
  rng = np.random.default_rng(0)
  pool = ['yes', 'Yes', 'no', '2', 'two', 'the cat', 'cat', "don't", 'dont', 't-shirt', 'red']
  for _ in range(200):
    answers = [str(a) for a in rng.choice(pool, rng.integers(1, 12))]
    if len(set(answers)) == 1 and len(answers) > 1:
      continue
    for key, score in soft_scores(answers).items():
      assert score == pytest.approx(vqa_accuracy(key, answers), abs=1e-12)


def test_soft_scores_join_spellings_and_never_name_nothing():
  assert soft_scores(['Two', '2', 'red', 'red', 'Red.', 'two', 'blue', 'red', 'red', 'red']) == (
      pytest.approx({'2': 0.9, 'red': 1.0, 'blue': 0.3}))
  assert soft_scores(['T-shirt'] * 10) == {'t shirt': 1.0}
  assert soft_scores(['A']) == {'a': 1.0}
  assert soft_scores([]) == {}


def _sklearn_scores(predictions, truths):
  scores = {'accuracy': sklearn_metrics.accuracy_score(truths, predictions)}
  for average in ('macro', 'micro'):
    scores |= dict(zip(
        (f'precision_{average}', f'recall_{average}', f'f1_{average}'),
        sklearn_metrics.precision_recall_fscore_support(
            truths, predictions, average=average, zero_division=0)[:3]))
  return scores


@pytest.mark.parametrize('seed', range(8))
def test_label_scores_equal_sklearn_on_random_labels(seed):
  rng = np.random.default_rng(seed)
  size, num_labels = rng.integers(1, 300), rng.integers(1, 40)
  labels = np.array([f'label {i}' for i in range(num_labels)], object)
  predictions = labels[(num_labels * rng.random(size) ** 2).astype(int)]
  truths = np.where(rng.random(size) < 0.5, predictions, rng.choice(labels, size))
  assert classification_scores(list(predictions), list(truths)) == pytest.approx(
      _sklearn_scores(predictions, truths), abs=1e-12)


@pytest.mark.parametrize('predictions, truths', [
    (['a'], ['a']), (['a'], ['b']), (['a', 'a', 'a'], ['a', 'b', 'c']),
    (['x', 'y'], ['a', 'a']), (['', 'a', ' '], ['', ' ', ' ']), (['é', 'e'], ['é', 'é'])])
def test_label_scores_equal_sklearn_on_odd_labels(predictions, truths):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # sklearn warns of labels without true samples
    wanted = _sklearn_scores(predictions, truths)
  assert classification_scores(predictions, truths) == pytest.approx(wanted, abs=1e-12)


def test_labels_are_told_apart_to_the_last_character():
  # numpy strings lose trailing NULs; 'a' and 'a\0' are two labels.
  assert classification_scores(['a\0', 'a'], ['a', 'a'])['accuracy'] == 0.5


@pytest.mark.parametrize('predictions, truths', [([], []), (['a'], ['a', 'b'])])
def test_label_scores_need_pairs(predictions, truths):
  with pytest.raises(ValueError, match='as many predictions as truths'):
    classification_scores(predictions, truths)


def test_accuracy_by_group():
  assert accuracy_by_group([1, 0, 0.5, 1], ['b', 'a', 'b', 'b']) == {
      'a': (0.0, 1), 'b': (pytest.approx(2.5 / 3), 3)}
  with pytest.raises(ValueError, match='a group for each'):
    accuracy_by_group([1, 0], ['a'])


def test_constant_baseline_is_the_best_of_all_answers():
  """Against brute force over all answers and questions, on mixed sizes."""
  rng = np.random.default_rng(1)
  pool = ['yes', 'no', 'No', 'No.', 't-shirt', 't shirt', 'two', '2', 'cat', 'The cat']
  for _ in range(40):
    people = rng.choice([1, 3, 10])
    truths = [[str(a) for a in rng.choice(rng.choice(pool, 2), people)] for _ in range(12)]
    answer, accuracy = constant_baseline(truths, ['all'] * 12)['all']
    tried = [np.mean([vqa_accuracy(candidate, answers) for answers in truths])
             for candidate in pool]
    assert accuracy == pytest.approx(max(tried), abs=1e-12)
    assert accuracy == pytest.approx(
        np.mean([vqa_accuracy(answer, answers) for answers in truths]), abs=1e-12)


def test_constant_baseline_knows_the_group():
  truths = [['yes'], ['yes'], ['no'], ['2'], ['two']]
  groups = ['exists', 'exists', 'exists', 'count', 'count']
  baseline = constant_baseline(truths, groups)
  assert list(baseline) == ['count', 'exists']
  assert baseline['exists'] == ('yes', pytest.approx(2 / 3))
  assert baseline['count'][1] == 1.0
