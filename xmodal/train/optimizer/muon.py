"""Muon (arXiv:2502.16982): orthogonalised updates for the matrices of layers."""

import re

import jax
import optax
from optax import contrib

from xmodal.options import ABOVE_ZERO, Option
from xmodal.sharding.rules import path_name
from xmodal.train.optimizer.optimizer import OPTIMIZERS, decays, with_separate_counts

# Paths of the kernels of stacked layers, [L, in, out].
_LAYERS = re.compile(r'(^|.*[/_])layers/.*/kernel')
# Root mean square of Muon's updates, about that of AdamW's (arXiv:2502.16982, section 2.2).
_MUON_SIZE = 0.2


@OPTIMIZERS.register('muon', options={
    'muon_rate': Option(1.0, "Factor of the learning rate for Muon's matrices.", low=ABOVE_ZERO)})
def muon(config, schedule, resting) -> optax.GradientTransformation:
  """Muon for the kernels of layers, AdamW with Nesterov momentum for other parameters."""
  # Directions only, hence the minus: sign, rate and decay are applied below to all parameters.
  directions = contrib.muon(
      -config.muon_rate, consistent_rms=_MUON_SIZE,
      muon_weight_dimension_numbers=_matrices, adam_learning_rate=-1.0, adam_b1=config.b1,
      adam_b2=config.b2, eps=config.eps)
  return optax.chain(with_separate_counts(directions, resting),
                     optax.add_decayed_weights(config.weight_decay, decays),
                     optax.scale_by_learning_rate(schedule))


def _matrices(params):
  """Muon's dimension numbers for kernels of layers, one matrix per layer; None for others."""
  def matrix(path, x):
    if x.ndim == 3 and _LAYERS.fullmatch(path_name(path)):
      return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return None

  return jax.tree_util.tree_map_with_path(matrix, params)
