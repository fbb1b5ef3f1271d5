"""T5 text-to-text transformer: 1.0 (arXiv:1910.10683) and 1.1 (gated GELU, untied head)."""

from collections.abc import Callable, Mapping
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from xmodal import target
from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_sizes, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, WRITER
from xmodal.options import Option


def relative_position_buckets(relative: np.ndarray | int, *, bidirectional: bool, num_buckets: int,
                              max_distance: int) -> np.ndarray:
  """Bucket of each relative position (key minus query), section 2.1 of the paper.

  Half of the buckets hold one distance each, the others grow logarithmically up to
  max_distance. If bidirectional, half of all buckets are for keys to the right.

  Args:
    relative: int numpy array of any shape.
    bidirectional: if false, all keys to the right get bucket 0.
    num_buckets: number of buckets.
    max_distance: all distances from this one on share the last bucket.

  Returns:
    int32 numpy array of the same shape, in [0, num_buckets).
  """
  relative = np.asarray(relative)
  offset = 0
  if bidirectional:
    num_buckets //= 2
    offset = np.where(relative > 0, num_buckets, 0)
    distance = np.abs(relative)
  else:
    distance = np.maximum(-relative, 0)
  exact = num_buckets // 2
  # In float32, as in training of the published models.
  growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  growth = growth / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
  far = np.minimum(exact + growth.astype(np.int32), num_buckets - 1)
  return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


def _neighbor_bias_init(rng, shape, dtype=jnp.float32, *, bias, buckets):
  """Initialiser [num_buckets, H]: each head favours tokens 1, 2 to 3, 4 to 7 or 8 to 15 away.

  With bidirectional buckets the heads alternate between sides: the first head favours the previous
  token, the second the next one, the third those two and three before, and so on.
  """
  del rng
  table, sides = np.zeros(shape, np.float32), (-1, 1) if buckets(1) != buckets(0) else (-1,)
  for head in range(shape[1]):
    near = 2 ** (head // len(sides) % 4)
    table[buckets(sides[head % len(sides)] * np.arange(near, 2 * near)), head] = bias
  return jnp.asarray(table, dtype)


class _Layer(nn.Module):
  """Fields and sublayers shared by both kinds of layer; attributes as in T5."""

  hidden_dim: int
  head_dim: int
  num_heads: int
  mlp_dim: int
  gated: bool
  layer_norm_epsilon: float
  dropout_rate: float
  attention_implementation: str
  dtype: jnp.dtype

  def _norm(self):
    return nn.RMSNorm(self.layer_norm_epsilon, dtype=self.dtype)

  def _attention(self):
    # T5 does not scale its logits; the initialiser of the query kernel does.
    init = nn.initializers.variance_scaling
    return MultiHeadAttention(
        self.num_heads, self.head_dim, self.hidden_dim, use_bias=False, scale=1.,
        dropout_rate=self.dropout_rate, dtype=self.dtype,
        implementation=self.attention_implementation,
        kernel_init=init(1., 'fan_in', 'normal'),
        query_init=init(1. / self.head_dim, 'fan_in', 'normal'))

  def _mlp(self):
    return Mlp(self.mlp_dim, self.hidden_dim, 'gelu_tanh' if self.gated else 'relu', self.gated,
               use_bias=False, dropout_rate=self.dropout_rate, dtype=self.dtype,
               kernel_init=nn.initializers.variance_scaling(1., 'fan_in', 'normal'))


class EncoderLayer(_Layer):
  """Self-attention and MLP, each pre-norm and residual: [B, L, D] -> [B, L, D]."""

  def setup(self):
    self.attention_norm, self.attention = self._norm(), self._attention()
    self.mlp_norm, self.mlp = self._norm(), self._mlp()
    self.dropout = nn.Dropout(self.dropout_rate)

  def __call__(self, x: Float[Array, 'B L D'], *, bias: Float[Array, '1 H L L'],
               mask: Bool[Array, 'B 1 1 L'], deterministic: bool) -> Float[Array, 'B L D']:
    y = self.attention(self.attention_norm(x), bias=bias, mask=mask, deterministic=deterministic)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.mlp(self.mlp_norm(x), deterministic=deterministic)
    return x + self.dropout(y, deterministic=deterministic)


class DecoderLayer(_Layer):
  """Self-attention, cross-attention and MLP, each pre-norm and residual."""

  def setup(self):
    self.attention_norm, self.attention = self._norm(), self._attention()
    self.cross_attention_norm, self.cross_attention = self._norm(), self._attention()
    self.mlp_norm, self.mlp = self._norm(), self._mlp()
    self.dropout = nn.Dropout(self.dropout_rate)

  def __call__(self, x: Float[Array, 'B T D'], cross_key: Float[Array, 'B H K head_dim'],
               cross_value: Float[Array, 'B H K head_dim'], *, bias: Float[Array, '1 H #T M'],
               mask: Bool[Array, 'B 1 T M'] | Bool[Array, 'T M'],
               cross_mask: Bool[Array, 'B 1 1 K'], cached: tuple | None = None,
               deterministic: bool = True
               ) -> tuple[Float[Array, 'B T D'],
                          tuple[Float[Array, 'B H M head_dim'], Float[Array, 'B H M head_dim']]]:
    """Updates x [B, T, D]; also returns the keys and values of the self-attention.

    Args:
      x: [B, T, D].
      cross_key, cross_value: from cross_keys_values.
      bias, mask: of the self-attention over M tokens (T, or the length of the cache).
      cross_mask: False for padding of the encoded stream.
      cached: (key, value, place) with keys and values [B, H, M, head_dim]; the keys and
        values of x overwrite those from index `place` on.
      deterministic: no dropout.
    """
    y = self.attention_norm(x)
    key, value = map(_swap, self.attention.keys_values(y))
    if cached is not None:
      key, value = (jax.lax.dynamic_update_slice_in_dim(old, new, cached[2], axis=2)
                    for old, new in zip(cached, (key, value)))
    y = self.attention.attend(y, _swap(key), _swap(value), bias=bias, mask=mask,
                              deterministic=deterministic)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.cross_attention.attend(self.cross_attention_norm(x), _swap(cross_key),
                                    _swap(cross_value), mask=cross_mask,
                                    deterministic=deterministic)
    x = x + self.dropout(y, deterministic=deterministic)
    y = self.mlp(self.mlp_norm(x), deterministic=deterministic)
    return x + self.dropout(y, deterministic=deterministic), (key, value)

  def cross_keys_values(self, encoded: Float[Array, 'B K C']
                        ) -> tuple[Float[Array, 'B H K head_dim'], Float[Array, 'B H K head_dim']]:
    """Projects [B, K, C] to key and value, each [B, H, K, head_dim]."""
    return tuple(map(_swap, self.cross_attention.keys_values(encoded)))


def _swap(x):
  """Swaps [B, K, H, head_dim], as in attention's arguments, and [B, H, K, head_dim]."""
  return x.swapaxes(1, 2)


OPTIONS = WIDTHS | WRITER | {
    'neighbor_bias': Option(None, 'Initial attention bias of heads towards neighbouring words. '
                            'None: no bias, as published; word order then has little effect until '
                            'it is learned.', kind=float, low=0)}

PRESETS = {
    'tiny': dict(hidden_dim=64, head_dim=16, num_heads=4, mlp_dim=128, num_layers=1,
                 num_decoder_layers=1),
    'small': dict(hidden_dim=512, head_dim=64, num_heads=6, mlp_dim=1024, num_layers=8,
                  num_decoder_layers=8),
    'base': dict(hidden_dim=768, head_dim=64, num_heads=12, mlp_dim=2048, num_layers=12,
                 num_decoder_layers=12),
    'large': dict(hidden_dim=1024, head_dim=64, num_heads=16, mlp_dim=2816, num_layers=24,
                  num_decoder_layers=24),
    'xl': dict(hidden_dim=2048, head_dim=64, num_heads=32, mlp_dim=5120, num_layers=24,
               num_decoder_layers=24),
}


@PARTS.register('t5', options=OPTIONS, slot='text', presets=PRESETS, sharding=(
    (r'relative_bias/embedding$', ()),), fixed={
    'gated': True, 'tie_word_embeddings': False, 'scale_decoder_outputs': False})
class T5(nn.Module):
  """Encoder and decoder of T5; only the parts that are used have parameters.

  Attributes:
    vocab_size: V.
    hidden_dim: D.
    head_dim: width of a head.
    num_heads: H; H * head_dim need not equal D.
    mlp_dim: width inside the MLPs.
    num_layers: encoder layers.
    num_decoder_layers: decoder layers.
    relative_attention_num_buckets: see `relative_position_buckets`.
    relative_attention_max_distance: see `relative_position_buckets`.
    neighbor_bias: initial relative position bias of each head towards its neighbours, see
      `_neighbor_bias_init`; None: small random biases, as published.
    gated: whether MLPs are gated, with tanh-GELU (1.1), or plain, with ReLU (1.0).
    tie_word_embeddings: whether the output layer uses the embedding (1.0).
    scale_decoder_outputs: whether to divide by sqrt(D) before the output layer (1.0).
    layer_norm_epsilon: epsilon of the norms.
    dropout_rate: dropout in training.
    attention: kernel, see `attention.attention`.
    dtype: of the computation; parameters and logits are float32.
    remat: see `layers.scan_layers`.
    scan_unroll: see `layers.scan_layers`.
  """

  vocab_size: int
  hidden_dim: int
  head_dim: int
  num_heads: int
  mlp_dim: int
  num_layers: int
  num_decoder_layers: int
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  neighbor_bias: float | None = None
  gated: bool = False
  tie_word_embeddings: bool = True
  scale_decoder_outputs: bool = True
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.
  attention: str = 'xla'
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  scan_unroll: int = 1

  @nn.nowrap
  def check(self):
    """Raises UserError for fields that are out of range or do not fit together."""
    sizes = ['vocab_size', 'hidden_dim', 'head_dim', 'num_heads', 'mlp_dim', 'num_layers',
             'relative_attention_num_buckets', 'relative_attention_max_distance']
    if self.num_decoder_layers:  # 0: an encoder alone
      sizes.append('num_decoder_layers')
    check_sizes('T5', self, *sizes)
    buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    # Half of the buckets hold one distance each; the encoder splits them between two sides.
    if buckets < 4 or distance <= buckets // (2 if self.num_decoder_layers else 4):
      raise UserError(f'T5: relative_attention_num_buckets is {buckets} and '
                      f'relative_attention_max_distance {distance}, wanted 4 buckets or more and a '
                      'distance above half of them')

  def setup(self):
    self.check()
    fields = (self.hidden_dim, self.head_dim, self.num_heads, self.mlp_dim, self.gated,
              self.layer_norm_epsilon, self.dropout_rate, self.attention, self.dtype)
    self.token_embedding = nn.Embed(self.vocab_size, self.hidden_dim, dtype=self.dtype,
                                    embedding_init=nn.initializers.normal(1.))
    self.dropout = nn.Dropout(self.dropout_rate)
    self.encoder_relative_bias = self._relative_bias(bidirectional=True)
    self.encoder_layers = EncoderLayer(*fields)
    self.encoder_norm = nn.RMSNorm(self.layer_norm_epsilon, dtype=self.dtype)
    self.decoder_relative_bias = self._relative_bias(bidirectional=False)
    self.decoder_layers = DecoderLayer(*fields)
    self.decoder_norm = nn.RMSNorm(self.layer_norm_epsilon, dtype=self.dtype)
    self.lm_head = nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype,
                            dot_general=_float32_dot_general)

  def __call__(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L'],
               decoder_tokens: Int[Array, 'B T'], *, deterministic: bool = True
               ) -> Float[Array, 'B T {self.vocab_size}']:
    """Teacher-forced logits [B, T, V]: `encode`, then `decode`."""
    encoded = self.encode(tokens, mask, deterministic=deterministic)
    return self.decode(decoder_tokens, encoded, mask, deterministic=deterministic)

  def encode(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L'], *,
             deterministic: bool = True) -> Float[Array, 'B L {self.hidden_dim}']:
    """Encodes tokens int32 [B, L] to [B, L, D]; mask: bool [B, L], False for padding."""
    length = tokens.shape[1]
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    bias = self._bias(self.encoder_relative_bias, self._buckets(relative, bidirectional=True))
    mask = mask[:, None, None, :]

    def body(layer, x, _):
      return layer(x, bias=bias, mask=mask, deterministic=deterministic), None

    x = self.dropout(self.token_embedding(tokens), deterministic=deterministic)
    x, _ = scan_layers(body, self.encoder_layers, x, num_layers=self.num_layers,
                       remat=self.remat, unroll=self.scan_unroll)
    return self.dropout(self.encoder_norm(x), deterministic=deterministic)

  def decode(self, tokens: Int[Array, 'B T'], encoded: Float[Array, 'B K C'],
             encoded_mask: Bool[Array, 'B K'], *, deterministic: bool = True
             ) -> Float[Array, 'B T {self.vocab_size}']:
    """Teacher-forced logits: position t attends to tokens 0..t and to the encoded stream.

    Args:
      tokens: int32 [B, T], the start token first.
      encoded: [B, K, C], the encoder's output or any other stream.
      encoded_mask: bool [B, K], False for padding.
      deterministic: no dropout.

    Returns:
      float32 logits [B, T, V]; position t predicts token t + 1.
    """
    length = tokens.shape[1]
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    bias = self._bias(self.decoder_relative_bias, self._buckets(relative, bidirectional=False))
    causal, cross_mask = relative <= 0, encoded_mask[:, None, None, :]

    def body(layer, x, _):
      cross_key, cross_value = layer.cross_keys_values(encoded)
      x, _ = layer(x, cross_key, cross_value, bias=bias, mask=causal, cross_mask=cross_mask,
                   deterministic=deterministic)
      return x, None

    x = self.dropout(self.token_embedding(tokens), deterministic=deterministic)
    x, _ = scan_layers(body, self.decoder_layers, x, num_layers=self.num_decoder_layers,
                       remat=self.remat, unroll=self.scan_unroll)
    return self._logits(self.dropout(self.decoder_norm(x), deterministic=deterministic))

  def init_cache(self, encoded: Float[Array, 'B K C'], encoded_mask: Bool[Array, 'B K'],
                 max_length: int, num_beams: int = 1) -> dict:
    """Cache for up to max_length calls of `decode_step` on an encoded stream [B, K, C].

    The W beams of a row share one cache. When a beam continues another one, the keys
    are not moved; `ancestors` gives the beam that wrote each of its tokens.

    Returns:
      dict of `index` int32, the number of tokens so far; `ancestors` int32
      [B, W, max_length], the beam that wrote each token of a beam's text; `key`
      and `value`, per layer [B, H, max_length * W, head_dim], ordered by
      token, then beam; `cross_key` and `cross_value`, per layer
      [B, H, K, head_dim]; `cross_mask` bool [B, K].
    """
    layer, _ = self._unstacked()
    layers, _ = self.prepare_decoding()
    cross = [layer.apply(variables, encoded, method='cross_keys_values') for variables in layers]
    shape = (encoded.shape[0], self.num_heads, max_length * num_beams, self.head_dim)
    # One array per layer: slices of a single array would be copied at every step.
    empty = tuple(jnp.zeros(shape, cross[0][0].dtype) for _ in layers)
    return {'index': jnp.zeros((), jnp.int32),
            'ancestors': jnp.zeros((encoded.shape[0], num_beams, max_length), jnp.int32),
            'key': empty, 'value': empty, 'cross_key': tuple(key for key, _ in cross),
            'cross_value': tuple(value for _, value in cross), 'cross_mask': encoded_mask}

  def decode_step(self, token: Int[Array, ' N'], cache: dict, prepared: tuple | None = None
                  ) -> tuple[Float[Array, 'N {self.vocab_size}'], dict]:
    """Decodes one step with the cache.

    Args:
      token: int32 [B * W], the last token of each beam.
      cache: from `init_cache` or the previous step.
      prepared: from `prepare_decoding`; None: prepared in this step.

    Returns:
      float32 logits [B * W, V] of the next token, and the updated cache.
    """
    index, (batch, beams, max_length) = cache['index'], cache['ancestors'].shape
    ancestors = jax.lax.dynamic_update_slice_in_dim(
        cache['ancestors'], jnp.broadcast_to(jnp.arange(beams)[:, None], (batch, beams, 1)), index,
        axis=2)
    places = jnp.arange(max_length)
    buckets = self._buckets(-np.arange(max_length), bidirectional=False)
    buckets = jnp.asarray(buckets)[jnp.maximum(index - places, 0)]
    bias = jnp.repeat(self._bias(self.decoder_relative_bias, buckets[None]), beams, axis=-1)
    mask = (places <= index)[:, None] & (ancestors[..., None] == jnp.arange(beams))
    mask, cross_mask = mask.reshape(batch, 1, beams, -1), cache['cross_mask'][:, None, None, :]

    layer, _ = self._unstacked()
    sliced, output_kernel = prepared or self.prepare_decoding()
    x, written = self.token_embedding(token.reshape(batch, beams)), []
    for i, variables in enumerate(sliced):
      x, keys_values = layer.apply(
          variables, x, cache['cross_key'][i], cache['cross_value'][i], bias=bias, mask=mask,
          cross_mask=cross_mask, cached=(cache['key'][i], cache['value'][i], index * beams))
      written.append(keys_values)
    key, value = zip(*written)
    logits = self._logits(self.decoder_norm(x), output_kernel)
    return logits.reshape(batch * beams, -1), {
        **cache, 'index': index + 1, 'ancestors': ancestors, 'key': key, 'value': value}

  def prepare_decoding(self) -> tuple[tuple, Float[Array, 'D V'] | None]:
    """What all steps share: each layer's variables, and the kernel of a tied output layer."""
    _, stacked = self._unstacked()
    layers = tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(self.num_decoder_layers))
    if not self.tie_word_embeddings or target.platform() != 'cpu':
      return layers, None
    # XLA on a CPU multiplies 2 to 7 rows by a transposed matrix 30 times as slowly. The barrier
    # keeps it from moving the transposition back into the product.
    kernel = self.token_embedding.embedding.astype(self.dtype).T
    return layers, jax.lax.optimization_barrier(kernel)

  def _unstacked(self):
    """An unbound decoder layer, and the stacked variables of all layers."""
    layer, stacked = self.decoder_layers.unbind()
    # Flash attention is not faster for so few queries.
    return layer.clone(attention_implementation='xla'), stacked

  def _relative_bias(self, *, bidirectional):
    init = nn.initializers.normal(self.hidden_dim ** -0.5)
    if self.neighbor_bias is not None:
      buckets = functools.partial(self._buckets, bidirectional=bidirectional)
      init = functools.partial(_neighbor_bias_init, bias=self.neighbor_bias, buckets=buckets)
    return nn.Embed(self.relative_attention_num_buckets, self.num_heads, embedding_init=init)

  def _buckets(self, relative, *, bidirectional):
    return relative_position_buckets(
        relative, bidirectional=bidirectional, num_buckets=self.relative_attention_num_buckets,
        max_distance=self.relative_attention_max_distance)

  def _bias(self, relative_bias, buckets):
    """Buckets [Q, K] to bias [1, H, Q, K], the same in every layer."""
    return relative_bias(buckets).transpose(2, 0, 1)[None]

  def _logits(self, x, kernel=None):
    if self.scale_decoder_outputs:
      x = x * jnp.asarray(self.hidden_dim ** -0.5, x.dtype)
    if self.tie_word_embeddings:
      kernel = self.token_embedding.embedding.astype(x.dtype).T if kernel is None else kernel
      return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    return self.lm_head(x)


def _float32_dot_general(*args, **kwargs):
  return jax.lax.dot_general(*args, **kwargs | {'preferred_element_type': jnp.float32})


def start_writing(module: T5, variables: Mapping, encoded: Float[Array, 'B K C'],
                  encoded_mask: Bool[Array, 'B K'], max_length: int, num_beams: int = 1
                  ) -> tuple[Callable, dict]:
  """A step function and its initial cache, as `generate` takes them.

  Args:
    module, variables: a T5 and its parameters.
    encoded: [B, K, C], the encoder's output or any other stream.
    encoded_mask: bool [B, K], False for padding.
    max_length: maximum number of generated tokens.
    num_beams: W, beams per row.

  Returns:
    Function (token int32 [B * W], cache) -> (logits [B * W, V], cache), and the cache.
  """
  prepared = module.apply(variables, method='prepare_decoding')

  def step(token, cache):
    return module.apply(variables, token, cache, prepared, method='decode_step')

  return step, module.apply(variables, encoded, encoded_mask, max_length, num_beams,
                            method='init_cache')
