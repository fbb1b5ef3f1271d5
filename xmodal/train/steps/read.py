"""Parameters as the layers of a model read them."""

from xmodal.models.quantized import rounded
from xmodal.sharding.gather import gather_when_used


def as_read(model, params):
  """Parameters that layers gather over `fsdp`, and round if model.rounding is set, on reading."""
  return rounded(gather_when_used(params), getattr(model, 'rounding', None))
