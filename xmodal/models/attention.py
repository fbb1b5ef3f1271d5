"""Attention: a function that selects the kernel, and the multi-head layer that uses it."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from xmodal import target
from xmodal.errors import UserError
from xmodal.models.capture import offer

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')
# With fewer keys XLA is faster (one H200: 32 keys .12 ms against .20, 196 keys 1.48 against .63).
_FEW_KEYS = 64

# Broadcastable to [B, H, Q, K]; True where a query may attend to a key.
AttentionMask = Bool[Array, '#B #H #Q #K'] | Bool[Array, '#Q #K']
AttentionBias = Float[Array, '#B #H #Q K']


def attention(query: Float[Array, 'B Q H D'], key: Float[Array, 'B K H D'],
              value: Float[Array, 'B K H D'], *, bias: AttentionBias | None = None,
              mask: AttentionMask | None = None, scale: float | None = None,
              dropout_rate: float = 0., dropout_rng: Key[Array, ''] | None = None,
              implementation: str = 'xla') -> Float[Array, 'B Q H D']:
  """Scaled dot-product attention, softmax(q k^T * scale + bias) v (arXiv:1706.03762, eq. 1).

  The softmax is computed in float32 for any input dtype. A query whose keys are
  all masked gets zeros.

  Args:
    query: [B, Q, H, D].
    key: [B, K, H, D].
    value: [B, K, H, D].
    bias: float [1 or B, 1 or H, 1 or Q, K], added to the scaled logits.
    mask: bool, broadcastable to [B, H, Q, K]; True where a query may attend.
    scale: factor of the logits; 1/sqrt(D) by default.
    dropout_rate: share of the attention weights set to zero.
    dropout_rng: key for the dropout; required if dropout_rate > 0.
    implementation: 'xla' (any device), 'cudnn' (flash attention on NVIDIA
      GPUs, 16-bit floats, no dropout) or 'auto' (cudnn where it is possible and
      faster). A single query, as in decoding, always uses 'xla': flash attention
      would not be faster.

  Returns:
    [B, Q, H, D] in the dtype of value.

  Raises:
    UserError: the implementation is unknown or does not support the arguments.
  """
  if scale is None:
    scale = query.shape[-1] ** -0.5
  if implementation == 'auto':
    few = key.shape[1] <= _FEW_KEYS
    implementation = 'xla' if few or _why_not_cudnn(query, dropout_rate) else 'cudnn'
  if implementation == 'xla' or (implementation == 'cudnn' and query.shape[1] == 1):
    output = _xla(query, key, value, bias, mask, scale, dropout_rate, dropout_rng)
  elif implementation == 'cudnn':
    output = _cudnn(query, key, value, bias, mask, scale, dropout_rate)
  else:
    raise UserError(f'attention implementation {implementation!r} is unknown; '
                    f'use one of {IMPLEMENTATIONS}')
  if mask is None:
    return output
  # If all keys are masked, both kernels return the mean of the values. Masking the
  # output costs [B, Q, H, D]; masking the weights again would cost [B, H, Q, K].
  sees_any = jnp.moveaxis(jnp.any(_as_4d(mask), axis=-1, keepdims=True), 1, 2)
  return jnp.where(sees_any, output, 0)


def _as_4d(mask):
  return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _xla(query, key, value, bias, mask, scale, dropout_rate, dropout_rng):
  weights = _weights(query, key, bias, mask, scale)
  if dropout_rate > 0:
    keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, weights.shape)
    weights = jnp.where(keep, weights / (1 - dropout_rate), 0)
  value = value.swapaxes(1, 2)
  return jnp.einsum('bhqk,bhkd->bhqd', weights.astype(value.dtype), value).swapaxes(1, 2)


def attention_weights(query: Float[Array, 'B Q H D'], key: Float[Array, 'B K H D'], *,
                      bias: AttentionBias | None = None, mask: AttentionMask | None = None,
                      scale: float | None = None) -> Float[Array, 'B H Q K']:
  """The softmax weights of `attention`, without dropout: float32 [B, H, Q, K]."""
  weights = _weights(query, key, bias, mask, query.shape[-1] ** -0.5 if scale is None else scale)
  return weights if mask is None else jnp.where(_as_4d(mask), weights, 0)


def _weights(query, key, bias, mask, scale):
  # Heads first: XLA's matrix products on CPU are twice as fast in this layout.
  query, key = query.swapaxes(1, 2), key.swapaxes(1, 2)
  # Scale a float32 query, which is smaller than the logits; scaling would round a 16-bit one.
  scale_query = query.dtype == jnp.float32
  logits = jnp.einsum('bhqd,bhkd->bhqk', query * scale if scale_query else query, key,
                      preferred_element_type=jnp.float32)
  if not scale_query:
    logits *= scale
  if bias is not None:
    logits += bias.astype(jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits, axis=-1)


def _why_not_cudnn(query, dropout_rate):
  """Why cuDNN's flash attention cannot compute it; '' if it can."""
  if target.platform() != 'gpu':
    return f'the device is a {target.platform()}, an NVIDIA GPU is wanted'
  capability = tuple(map(int, getattr(target.devices()[0], 'compute_capability', '9.0').split('.')))
  if capability < (8, 0):
    return f'the GPU has compute capability {capability}, 8.0 or more is wanted'
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f'dtype is {query.dtype}, bfloat16 or float16 is wanted'
  head_dim, largest = query.shape[-1], 256 if capability >= (9, 0) else 128
  if head_dim % 8 or head_dim > largest:
    return f'head_dim is {head_dim}, a multiple of 8 up to {largest} is wanted'
  if dropout_rate > 0:
    return f'dropout_rate is {dropout_rate}, only 0 is possible'
  return ''


def _cudnn(query, key, value, bias, mask, scale, dropout_rate):
  if reason := _why_not_cudnn(query, dropout_rate):
    raise UserError(f"cudnn attention: {reason}; use implementation='xla'")
  (batch, query_length, _, _), key_length = query.shape, key.shape[1]
  # JAX refuses odd lengths in the backward pass. Pad with a query, which is dropped
  # again, and a key, which key_value_seq_lengths masks.
  pad_query, pad_key = query_length % 2, key_length % 2

  def pad(x, length):
    return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, 0)))

  def full(x):  # [1 or B, 1 or H, Q, K]: cuDNN does not broadcast Q and K.
    x = _as_4d(x)
    x = jnp.broadcast_to(x, x.shape[:2] + (query_length, key_length))
    return jnp.pad(x, ((0, 0), (0, 0), (0, pad_query), (0, pad_key)))

  output = jax.nn.dot_product_attention(
      pad(query, pad_query), pad(key, pad_key), pad(value, pad_key),
      bias=None if bias is None else full(bias.astype(query.dtype)),
      mask=None if mask is None else full(mask),
      key_value_seq_lengths=jnp.full(batch, key_length, jnp.int32) if pad_key else None,
      scale=float(scale), implementation='cudnn')
  return output[:, :query_length]


def usable(implementation: str) -> str:
  """The implementation if the target is a GPU, else 'xla'.

  Both kernels give the same results, so a model trained on a GPU runs anywhere.
  """
  return implementation if target.platform() == 'gpu' else 'xla'


class MultiHeadAttention(nn.Module):
  """Multi-head self-attention, or cross-attention to a context.

  Parameters: `query`, `key`, `value` (kernels [D, H * head_dim]) and `out`
  ([H * head_dim, D]), each with a bias if use_bias.

  To decode with a cache: compute `keys_values` of the new tokens, write them into
  the cached arrays, and call `attend` with these arrays.

  Attributes:
    num_heads: H.
    head_dim: width of a head; H * head_dim need not equal the model's width.
    out_dim: D, the width of the output.
    use_bias: whether the four projections have biases.
    out_bias: whether `out` has a bias; None: as use_bias.
    scale: factor of the logits; 1/sqrt(head_dim) by default.
    dropout_rate: share of the attention weights set to zero in training.
    dtype: of the computation; parameters are float32.
    implementation: see `attention`.
    kernel_init: initialiser of the kernels.
    query_init, key_init, out_init: initialisers of these kernels; None: kernel_init.
    query_key_norm: whether each head's queries and keys pass RMS norms (arXiv:2010.04245),
      `query_norm` and `key_norm`.
  """

  num_heads: int
  head_dim: int
  out_dim: int
  use_bias: bool = True
  out_bias: bool | None = None
  scale: float | None = None
  dropout_rate: float = 0.
  dtype: jnp.dtype = jnp.float32
  implementation: str = 'xla'
  kernel_init: Callable = nn.initializers.lecun_normal()
  query_init: Callable | None = None
  key_init: Callable | None = None
  out_init: Callable | None = None
  query_key_norm: bool = False

  def setup(self):
    def dense(features, kernel_init=self.kernel_init, use_bias=self.use_bias):
      return nn.Dense(features, use_bias=use_bias, dtype=self.dtype, kernel_init=kernel_init)

    width = self.num_heads * self.head_dim
    out_bias = self.use_bias if self.out_bias is None else self.out_bias
    self.query = dense(width, self.query_init or self.kernel_init)
    self.key = dense(width, self.key_init or self.kernel_init)
    self.value = dense(width)
    self.out = dense(self.out_dim, self.out_init or self.kernel_init, out_bias)
    if self.query_key_norm:
      self.query_norm = nn.RMSNorm(dtype=self.dtype)
      self.key_norm = nn.RMSNorm(dtype=self.dtype)

  def __call__(self, inputs: Float[Array, 'B Q D'], context: Float[Array, 'B K C'] | None = None,
               *, values: Float[Array, 'B K V'] | None = None, bias: AttentionBias | None = None,
               mask: AttentionMask | None = None, query_scale: Float[Array, ''] | None = None,
               rotate: Callable | None = None, deterministic: bool = True
               ) -> Float[Array, 'B Q {self.out_dim}']:
    """Attends from inputs [B, Q, D] to context [B, K, C] (default: the inputs).

    Args:
      inputs: the queries' source.
      context: the keys' source, and the values' unless `values` is given.
      values, rotate: see `keys_values`.
      bias, mask: see `attention`.
      query_scale: see `attend`.
      deterministic: no dropout.

    Returns:
      [B, Q, out_dim].
    """
    key, value = self.keys_values(inputs if context is None else context, values, rotate)
    return self.attend(inputs, key, value, bias=bias, mask=mask, query_scale=query_scale,
                       rotate=rotate, deterministic=deterministic)

  def keys_values(self, context: Float[Array, 'B K C'],
                  values: Float[Array, 'B K V'] | None = None, rotate: Callable | None = None
                  ) -> tuple[Float[Array, 'B K {self.num_heads} {self.head_dim}'],
                             Float[Array, 'B K {self.num_heads} {self.head_dim}']]:
    """Projects [B, K, C] to key and value, each [B, K, H, head_dim].

    Args:
      context: source of the keys.
      values: source of the values, if not the context. With a context to which position
        embeddings are added, the values can thus omit them.
      rotate: function that rotates keys [B, K, H, head_dim] by their positions, or None.
    """
    key = self._heads(self.key(context))
    if self.query_key_norm:
      key = self.key_norm(key)
    if rotate is not None:
      key = rotate(key)
    return key, self._heads(self.value(context if values is None else values))

  def attend(self, inputs: Float[Array, 'B Q D'], key: Float[Array, 'B K H head_dim'],
             value: Float[Array, 'B K H head_dim'], *, bias: AttentionBias | None = None,
             mask: AttentionMask | None = None, query_scale: Float[Array, ''] | None = None,
             rotate: Callable | None = None, deterministic: bool = True
             ) -> Float[Array, 'B Q {self.out_dim}']:
    """Attends from inputs [B, Q, D] to projected keys and values [B, K, H, head_dim].

    Args:
      inputs: the queries' source.
      key, value: from `keys_values`.
      bias, mask: see `attention`.
      query_scale: scalar factor of the queries, or None. Unlike `scale` it may be
        an array, with a different value in each layer of a scan.
      rotate: the function that rotated the keys.
      deterministic: no dropout.
    """
    query = self._heads(self.query(inputs))
    if self.query_key_norm:
      query = self.query_norm(query)
    if rotate is not None:
      query = rotate(query)
    if query_scale is not None:
      query = query * query_scale.astype(query.dtype)
    offer(self, 'weights', lambda: attention_weights(query, key, bias=bias, mask=mask,
                                                     scale=self.scale))
    dropout_rate = 0. if deterministic else self.dropout_rate
    output = attention(
        query, key, value, bias=bias, mask=mask, scale=self.scale,
        dropout_rate=dropout_rate,
        dropout_rng=self.make_rng('dropout') if dropout_rate > 0 else None,
        implementation=self.implementation)
    return self.out(output.reshape(*output.shape[:2], -1))

  def _heads(self, x):
    return x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
