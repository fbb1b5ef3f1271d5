"""Shared parts of the transformer towers besides attention: the MLP and the scan over layers."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xmodal import target
from xmodal.errors import UserError
from xmodal.models.capture import COLLECTION, offer
from xmodal.models.layout import keep_rows

ACTIVATIONS = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}

def _linear_or_flash(primitive, *values, **parameters) -> bool:
  """Whether the backward pass keeps an operation's outputs: those that cost much to compute again.
  Flash attention is no matrix product to JAX."""
  return (primitive.name in ('conv_general_dilated', 'dot_product_attention_fwd_wrapper') or
          jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
              primitive, *values, **parameters))


# Activations that the backward pass keeps; it recomputes the others.
REMAT_POLICIES = {
    'full': None,  # Only each layer's input.
    'dots': _linear_or_flash,  # Outputs of linear layers, convolutions and flash attention.
}
REMAT = ('auto', 'none', *REMAT_POLICIES)

_LARGEST = 2 ** 31 - 1


def check_sizes(tower: str, module, *sizes: str) -> None:
  """Raises UserError if a field of a module is out of range.

  Args:
    tower: its name in the message.
    module: has dropout_rate, and perhaps layer_norm_eps or layer_norm_epsilon.
    *sizes: names of fields that must be integers from 1 on, or tuples of them.
  """
  for field in sizes:
    value = getattr(module, field)
    for size in value if isinstance(value, tuple) else (value,):
      if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _LARGEST:
        raise UserError(f'{tower}: {field} is {value}, wanted whole numbers from 1, below 2^31')
  if not 0 <= module.dropout_rate < 1:
    raise UserError(f'{tower}: dropout_rate is {module.dropout_rate}, wanted 0 or more, below 1')
  for field in ('layer_norm_eps', 'layer_norm_epsilon'):
    if not 0 <= getattr(module, field, 0) < float('inf'):
      raise UserError(f'{tower}: {field} is {getattr(module, field)}, wanted 0 or more')


def head_width(tower: str, module) -> int:
  """A module's head_dim, else hidden_dim / num_heads; UserError if that is not whole."""
  if module.head_dim is None and module.hidden_dim % module.num_heads:
    raise UserError(f'{tower}: hidden_dim {module.hidden_dim} does not divide into '
                    f'{module.num_heads} heads')
  return module.head_dim or module.hidden_dim // module.num_heads


def check_length(tower: str, length: int, max_positions: int) -> None:
  """Raises UserError if texts are longer than the position table."""
  if length > max_positions:
    raise UserError(f'{tower}: texts are {length} tokens long, at most its max_positions='
                    f'{max_positions} are possible; cut them shorter')


class Mlp(nn.Module):
  """Two linear layers with an activation between them, [..., C] -> [..., D].

  Gated (arXiv:2002.05202): activation(gate(x)) * up(x) goes into `down`.

  Attributes:
    mlp_dim: hidden width.
    out_dim: D.
    activation: a key of ACTIVATIONS ('gelu' is the exact one).
    gated: whether the MLP is gated; adds the `gate` kernel.
    use_bias: whether the linear layers have biases.
    dropout_rate: dropout on the hidden activations, in training.
    dtype: of the computation; parameters are float32.
    kernel_init: initialiser of the kernels.
    down_init: initialiser of the last kernel; None: kernel_init.
  """

  mlp_dim: int
  out_dim: int
  activation: str = 'gelu_tanh'
  gated: bool = False
  use_bias: bool = True
  dropout_rate: float = 0.
  dtype: jnp.dtype = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  down_init: Callable | None = None

  @nn.compact
  def __call__(self, x: Float[Array, '*B C'], *, deterministic: bool = True
               ) -> Float[Array, '*B {self.out_dim}']:
    def dense(features, name, kernel_init=self.kernel_init):
      return nn.Dense(features, use_bias=self.use_bias, dtype=self.dtype,
                      kernel_init=kernel_init, name=name)

    activation = ACTIVATIONS[self.activation]
    hidden = dense(self.mlp_dim, 'up')(x)
    if self.gated:
      hidden = activation(dense(self.mlp_dim, 'gate')(x)) * hidden
    else:
      hidden = activation(hidden)
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
    return dense(self.out_dim, 'down', self.down_init or self.kernel_init)(hidden)


def remat_policy(name: str) -> str:
  """The policy that a config names; 'auto': 'dots' on accelerators, 'none' on a CPU.

  Norms and activations cost an accelerator less to compute again than to store and load.
  """
  if name == 'auto':
    return 'none' if target.platform() == 'cpu' else 'dots'
  return name


def rematerialized(body: Callable, policy: str, **kwargs):
  """The same function or module, whose activations the backward pass recomputes.

  Args:
    body: a function whose first argument is a module, or a module's class.
    policy: 'none', 'full' or 'dots', see REMAT_POLICIES.
    **kwargs: as nn.remat takes them.

  Raises:
    UserError: the policy is unknown.
  """
  if policy not in ('none', *REMAT_POLICIES):
    raise UserError(f'remat policy {policy!r} is unknown; use one of {("none", *REMAT_POLICIES)}')
  return body if policy == 'none' else nn.remat(body, policy=REMAT_POLICIES[policy], **kwargs)


def scan_layers(body: Callable, layer: nn.Module, carry, xs=None, *, num_layers: int,
                remat: str = 'none', unroll: int = 1):
  """Runs body(layer, carry, x) -> (carry, y) over num_layers copies of a layer.

  The layer's parameters get a leading axis [L, ...]. Each copy has its own
  dropout. Values that all layers share (masks, biases) belong in body's closure.

  Args:
    body: the function; it may call any method of the layer.
    layer: one layer, a Linen module bound to the caller (from its setup).
    carry: pytree passed from layer to layer.
    xs: pytree of arrays [L, ...], one slice per layer, or None.
    num_layers: L.
    remat: 'none', 'full' or 'dots', see REMAT_POLICIES.
    unroll: layers per loop iteration. unroll=L takes longer to compile and runs
      faster on a CPU.

  Returns:
    The last carry, and the ys stacked to [L, ...].

  Raises:
    UserError: the remat policy is unknown.
  """
  # A loop keeps the compiler from merging the recomputation with the forward pass; an unrolled
  # loop does not.
  body = rematerialized(body, remat, prevent_cse=unroll > 1)

  def between_layers(layer, carry, x):
    carry, y = body(layer, jax.tree.map(keep_rows, carry), x)
    carry = jax.tree.map(keep_rows, carry)
    offer(layer, 'tokens', lambda: carry)
    return carry, y

  return nn.scan(
      between_layers, variable_axes={'params': 0, COLLECTION: 0},
      split_rngs={'params': True, 'dropout': True}, length=num_layers, unroll=unroll,
      check_constancy_invariants=_draws(layer))(layer, carry, xs)


def _draws(layer):
  """Whether a layer uses random keys. Flax's check traces the body once more, which takes seconds,
  and counts the keys of both tracings: without it these would be others than in earlier versions.
  """
  return layer.is_initializing() or (
      layer.has_rng('dropout') and getattr(layer, 'dropout_rate', 1.0) > 0)
