"""Weights & Biases: one run there for all starts of a run here.

WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE and the other variables of W&B apply. Steps that a resumed
run repeats after a kill keep the metrics logged first.
"""

from collections.abc import Mapping
import os

from xmodal.train.logs.trackers.tracker import PROJECT, TRACKERS


@TRACKERS.register('wandb', options=PROJECT, package='wandb')
class Wandb:
  """Logs to a run of W&B."""

  def __init__(self, run, project: str):
    import wandb
    self._run = wandb.init(
        project=project, id=run.id, name=run.name, config=run.config.to_dict(), resume='allow',
        dir=os.environ.get('WANDB_DIR', run.workdir))

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """Logs SPLIT/NAME."""
    self._run.log({f'{split}/{key}': number for key, number in numbers.items()}, step=step)

  def close(self) -> None:
    """Uploads what is left."""
    self._run.finish()
