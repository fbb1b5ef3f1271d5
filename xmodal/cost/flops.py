"""Counts the floating-point operations of a traced function.

XLA's own count is of no use here: it counts the body of a loop once, so a model of scanned layers
appears to cost one layer, and on GPUs it returns nothing.
"""

import math
import typing

from jax.extend.core import jaxprs_in_params

# Names of JAX's cuDNN attention primitives, with their matrix products: (model, hardware). The
# backward pass computes the logits again.
_ATTENTION = {'dot_product_attention_fwd_wrapper': (2, 2),
              'dot_product_attention_bwd_wrapper': (4, 5)}


class Flops(typing.NamedTuple):
  """Operations of matrix products and convolutions; a multiplication and an addition are two.

  Attributes:
    model: without recomputation, as MFU counts them (arXiv:2204.02311, appendix B).
    hardware: with recomputation by rematerialisation and flash attention.
  """

  model: float
  hardware: float


def count(jaxpr) -> Flops:
  """Counts the FLOPs of a jaxpr, over all devices.

  A scan counts its body times its length; other loops, whose length is unknown, count it once. Of
  the branches of a conditional the most expensive counts. Element-wise operations do not count.

  Args:
    jaxpr: a jaxpr, such as `jax.jit(f).trace(*args).jaxpr`.
  """
  return Flops(_count(jaxpr, False, False), _count(jaxpr, False, True))


def _count(jaxpr, recomputes, hardware):
  """recomputes: whether the equations repeat work of the forward pass."""
  total = 0.0
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    again = recomputes or 'rematted_computation' in str(equation.source_info.name_stack)
    if again and not hardware:
      continue
    if name == 'dot_general':
      total += _dot(equation)
    elif name == 'conv_general_dilated':
      total += _convolution(equation)
    elif name in _ATTENTION:
      total += _attention(equation) * _ATTENTION[name][hardware]
    else:
      inner = [_count(body, again, hardware) for body in jaxprs_in_params(params)]
      if name == 'cond':
        total += max(inner)
      elif name == 'shard_map':
        # Versions of JAX have either name for it.
        axes = params['manual_axes' if 'manual_axes' in params else 'newly_manual_axes']
        total += sum(inner) * math.prod(params['mesh'].shape[axis] for axis in axes)
      else:
        total += sum(inner) * (params['length'] if name == 'scan' else 1)
  return total


def _dot(equation):
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(equation):
  kernel, params = equation.invars[1].aval.shape, equation.params
  features = kernel[params['dimension_numbers'].rhs_spec[0]]
  # Between inputs spread apart lie zeros, which no good kernel multiplies.
  return (2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
          / math.prod(params['lhs_dilation']))


def _attention(equation):
  """FLOPs of one matrix product of attention."""
  batch, queries, heads, width = equation.invars[0].aval.shape
  return 2 * batch * heads * queries * equation.invars[1].aval.shape[1] * width
