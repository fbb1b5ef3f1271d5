"""trackio: a local dashboard of runs, also on Hugging Face Spaces (TRACKIO_SPACE_ID).

Steps that a resumed run repeats after a kill are there twice.
"""

from collections.abc import Mapping

from xmodal.train.logs.trackers.tracker import PROJECT, TRACKERS


@TRACKERS.register('trackio', options=PROJECT, package='trackio')
class Trackio:
  """Logs to a run of trackio, which finds the runs of earlier starts by name."""

  def __init__(self, run, project: str):
    import trackio
    self._run = trackio.init(project=project, name=run.name, config=run.config.to_dict(),
                             resume='allow')

  def add(self, step: int, split: str, numbers: Mapping[str, float]) -> None:
    """Logs SPLIT/NAME."""
    self._run.log({f'{split}/{key}': number for key, number in numbers.items()}, step=step)

  def close(self) -> None:
    """Waits until all is written."""
    self._run.finish()
