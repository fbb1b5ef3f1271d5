"""Checkpoints between steps."""

import os

import jax

from xmodal.mixer import unusable
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.plan import Plan

_LEFT_OUT = 'left_out.json'


class Saving:
  """Saves the state every config.train.checkpoint_every steps, at the end, and on demand."""

  def __init__(self, plan: Plan, checkpoints: Checkpoints):
    self._plan, self._checkpoints = plan, checkpoints
    self._path = os.path.join(plan.workdir, _LEFT_OUT)

  def is_due(self, step: int) -> bool:
    """Whether to save the state after a step."""
    train = self._plan.config.train
    return step == train.steps or step % train.checkpoint_every == 0

  def save(self, state) -> None:
    """Saves a state in the background, unless its step is already saved."""
    self.note_left_out()  # first: a run resumed from this checkpoint would not see them again
    self._plan.folder.send()  # likewise the metrics
    self._checkpoints.save(state, self._plan.assets)

  def wait(self) -> None:
    """Waits until saved checkpoints are on disk."""
    self._checkpoints.wait()

  def load_left_out(self) -> None:
    """Reads the unusable pictures and boxes that earlier starts of the run recorded."""
    unusable.load(self._plan.feeds, self._path)

  def note_left_out(self) -> None:
    """Writes the unusable pictures and boxes; all processes must call it."""
    unusable.exchange(self._plan.feeds)
    if jax.process_index() == 0:
      unusable.save(self._plan.feeds, self._path)
