"""TensorBoard event files in WORKDIR/tensorboard."""

import os

from xmodal.train.logs.trackers.tracker import TRACKERS


@TRACKERS.register('tensorboard')
def open_board(run):
  """Opens event files that hold each step once."""
  from xmodal.train.logs.board import Board  # imports torch where it is installed: seconds
  return Board(os.path.join(run.workdir, 'tensorboard'), run.lines, run.keep)
