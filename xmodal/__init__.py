"""xmodal: one model that looks and reads, trained on many tasks together."""

import os
from typing import TYPE_CHECKING

from xmodal import xla

if TYPE_CHECKING:
  from xmodal.trained import TrainedModel

__version__ = '0.1.0'

xla.avoid_wrong_sums(os.environ)


def load(folder: 'str | os.PathLike', precision: str = '') -> 'TrainedModel':
  """A trained model to call: xmodal.load('runs/vqa')('a.jpg', 'what color is the square?').

  Args:
    folder: a workdir of xmodal train (its newest checkpoint), WORKDIR/best, or one of its
      checkpoints/STEP folders.
    precision: of the weights: 'float32', 'bfloat16', 'int8', 'int8_weights' or 'int4'; '': that of
      config.model.quantize, or float32. See xmodal/models/quantized.py.

  Raises:
    xmodal.errors.UserError: there is no checkpoint, it is damaged, or the precision is unknown.
  """
  from xmodal.trained import TrainedModel  # takes seconds: not for `import xmodal`
  return TrainedModel(folder, precision)
