"""The best evaluation so far: keeps its checkpoint, and ends training without improvement."""

from collections.abc import Mapping
import json
import math
import os

import jax

from xmodal import atomic
from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.train.checkpoints.checkpoint import BEST
from xmodal.train.evaluation import DEFAULT, Evaluation

OPTIONS = {
    'keep_best': Option('', 'Score whose best checkpoint is kept besides the newest: TASK (main '
                        "score), TASK/SCORE or EVALUATION/TASK/SCORE, such as 'vqa/accuracy'; "
                        "prefix '-': lower is better.", may_change=True),
    'patience': Option(0, 'Evaluations without improvement after which training ends; 0: never.',
                       low=0, may_change=True)}


class Best:
  """The best score of a run.

  Attributes:
    step: step of the best evaluation; None: no evaluation yet.
  """

  def __init__(self, train, evaluations: Mapping[str, Evaluation], workdir: str):
    """
    Args:
      train: config.train.
      evaluations: the run's evaluations, by name.
      workdir: folder of the run; its best.json is read.

    Raises:
      UserError: keep_best names no task, or patience is set without it.
    """
    self.step: int | None = None
    self._key, self._patience = train.keep_best, train.patience
    self._path = os.path.join(workdir, BEST)
    self._score, self._since = None, 0
    if train.patience and not train.keep_best:
      raise UserError(f'config.train.patience={train.patience} needs config.train.keep_best, the '
                      'score to watch')
    if train.keep_best:
      self._evaluation, self._task, self._name = _parse(train.keep_best, evaluations)
      self._read()

  def _read(self):
    try:
      with open(self._path, encoding='utf-8') as f:
        was = json.load(f)
      if was['key'] == self._key:
        self.step, self._score, self._since = int(was['step']), was['score'], int(was['since'])
    except (OSError, ValueError, KeyError, TypeError):
      pass  # missing, or truncated by a crash: the next evaluation counts as the best

  def forget_after(self, step: int) -> None:
    """Forgets a best score after `step`, the step of the checkpoint that the run resumes from."""
    if self.step is not None and self.step > step:
      self.step, self._score, self._since = None, None, 0

  def is_better(self, evaluation: str, scores: Mapping[str, Mapping]) -> bool | None:
    """Whether an evaluation has the best score so far; None if keep_best names another evaluation.

    Raises:
      UserError: the evaluation lacks the score.
    """
    if not self._key or evaluation != self._evaluation:
      return None
    found = scores[self._task]
    if found and self._name not in found:
      raise UserError(f'config.train.keep_best={self._key!r}: {self._task} has no score '
                      f'{self._name!r}; it has {", ".join(sorted(found))}')
    score = found.get(self._name)
    if score is None or math.isnan(score):
      return False
    return self._score is None or (
        score < self._score if self._key.startswith('-') else score > self._score)

  def note(self, step: int, better: bool, scores: Mapping[str, Mapping]) -> None:
    """Records the result of `is_better`; a better step's checkpoint must already be on disk."""
    if better:
      self.step, self._score, self._since = step, scores[self._task][self._name], 0
    else:
      self._since += 1
    if jax.process_index() == 0:
      with atomic.written(self._path) as f:
        json.dump({'key': self._key, 'step': self.step, 'score': self._score,
                   'since': self._since}, f)

  @property
  def is_exhausted(self) -> bool:
    """Whether to end training: no better score for `patience` evaluations."""
    return bool(self._patience) and self._since >= self._patience

  def __str__(self):
    return f'{self._key.lstrip("-")} {self._score:.4g} at step {self.step}'


def _parse(key, evaluations):
  """(evaluation, task, score) of config.train.keep_best."""
  parts = key.removeprefix('-').split('/')
  name = parts.pop(0) if parts[0] in evaluations and len(parts) > 1 else DEFAULT
  tasks = evaluations[name].tasks
  if parts[0] not in tasks:
    raise UserError(f'config.train.keep_best={key!r}: {parts[0]!r} is not one of the tasks '
                    f'{", ".join(tasks)}; wanted TASK, TASK/SCORE or EVALUATION/TASK/SCORE')
  task, *score = parts
  if not (score := '/'.join(score) or tasks[task].main_score):
    raise UserError(f'config.train.keep_best={key!r}: {task} has no main score; name one of its '
                    'scores, TASK/SCORE')
  return name, task, score
