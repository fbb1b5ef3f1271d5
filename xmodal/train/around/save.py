"""Checkpoints between steps."""

import os

import jax

from xmodal.mixer import met
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.plan import Plan

_LEFT_OUT = 'left_out.json'


class Saving:
  """Saves the state every config.train.checkpoint_every steps, at the end, and when asked."""

  def __init__(self, plan: Plan, checkpoints: Checkpoints):
    self._plan, self._checkpoints = plan, checkpoints
    self._path = os.path.join(plan.workdir, _LEFT_OUT)

  def is_due(self, step: int) -> bool:
    """Whether the state after a step is saved."""
    train = self._plan.config.train
    return step == train.steps or step % train.checkpoint_every == 0

  def save(self, state) -> None:
    """Saves a state in the background, unless its step is saved."""
    self.note_left_out()  # first: who goes on from this checkpoint does not meet them again
    self._checkpoints.save(state, self._plan.assets)

  def wait(self) -> None:
    """Returns when what was saved lies on disk."""
    self._checkpoints.wait()

  def load_left_out(self) -> None:
    """Reads which pictures and boxes earlier starts of the run could not use."""
    met.load(self._plan.feeds, self._path)

  def note_left_out(self) -> None:
    """Writes which pictures and boxes could not be used; all processes have to call it."""
    met.exchange(self._plan.feeds)
    if jax.process_index() == 0:
      met.save(self._plan.feeds, self._path)
