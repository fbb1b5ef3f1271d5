"""transformers' names for our activation functions."""

from collections.abc import Mapping

from xmodal.pretrained.tensors import require

# transformers' name -> ours. If a function has several names, the first is written.
_NAMES = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
          'gelu': 'gelu', 'relu': 'relu'}


def read_activation(config: Mapping, key: str) -> str:
  """The key of layers.ACTIVATIONS for config[key]; UserError if there is none."""
  require(config, key, tuple(_NAMES))
  return _NAMES[config[key]]


def write_activation(activation: str) -> str:
  """transformers' name for a key of layers.ACTIVATIONS."""
  return next(theirs for theirs, ours in _NAMES.items() if ours == activation)
