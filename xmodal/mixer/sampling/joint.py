"""Trains all tasks in every step."""

from collections.abc import Mapping

from xmodal.mixer.sampling.sampling import SAMPLINGS, Sampling, StepKind


@SAMPLINGS.register('joint')
def joint(sizes: Mapping[str, int], seed: int) -> Sampling:
  """A single kind of step, with all tasks."""
  del seed
  return Sampling((StepKind(tuple(sizes)),), ((0, 1),))
