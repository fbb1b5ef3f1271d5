"""Evaluations between steps."""

import jax

from xmodal.train.evaluation import DEFAULT
from xmodal.train.hooks.save import Saving
from xmodal.train.logs.report import Report
from xmodal.train.plan import Plan
from xmodal.train.process.stop import Stop


class Evaluating:
  """Runs the evaluations that are due.

  Attributes:
    scores: latest {evaluation: {task: scores}}.
  """

  def __init__(self, plan: Plan, report: Report, saving: Saving):
    self.scores: dict[str, dict] = {}
    self._evaluations, self._workdir, self._best = plan.evaluations, plan.workdir, plan.best
    self._report, self._saving, self._folder = report, saving, plan.folder

  def due(self, step: int) -> list[str]:
    """Names of the evaluations to run after a step."""
    return [name for name, one in self._evaluations.items() if one.is_due(step)]

  def run(self, names, state, stop: Stop) -> bool:
    """Runs the named evaluations on a state. If stopped, saves the state and returns False."""
    step = int(state.step)
    for name in names:
      one = self._evaluations[name]
      try:
        scores = one.run(state.variables, step, self._workdir, stop)
      except Exception:
        if jax.process_count() == 1:  # saving needs all processes, and others may not have failed
          self._saving.save(state)
        raise
      if scores is None:
        self._saving.save(state)
        return False
      self._report.write(step, name, {f'{task}/{key}': number for task, of_task in scores.items()
                                      for key, number in of_task.items()})
      for line in one.headlines(scores, step):
        self._report.say(line)
      self.scores[name] = scores
      self._note_best(name, scores, state)
    self._folder.send()
    return True

  def _note_best(self, name, scores, state):
    better = self._best.is_better(name, scores)
    if better is None:
      return
    if better:
      self._saving.save(state)
      self._saving.wait()
    self._best.note(int(state.step), better, scores)

  @property
  def final(self) -> dict[str, dict]:
    """The scores in the form of final.json."""
    more = {name: scores for name, scores in self.scores.items() if name != DEFAULT}
    return {'evaluation': self.scores[DEFAULT], **({'evaluations': more} if more else {})}
