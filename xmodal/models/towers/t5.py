"""T5 text-to-text transformer: 1.0 (arXiv:1910.10683) and 1.1 (gated GELU, untied head)."""

import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.attention import MultiHeadAttention
from xmodal.models.layers import Mlp, check_sizes, scan_layers
from xmodal.models.parts import PARTS, WIDTHS, WRITER, size
from xmodal.options import Option


def relative_position_buckets(relative, *, bidirectional, num_buckets, max_distance):
  """Bucket of each relative position (key minus query), section 2.1 of the paper.

  Half the buckets hold one distance each, the rest grow logarithmically up to
  max_distance. Bidirectional: half of all are for keys to the right.

  Args:
    relative: int numpy array of any shape.
    bidirectional: False gives every key to the right bucket 0.
    num_buckets: number of buckets.
    max_distance: distances from here on share the last bucket.

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
  # In float32, as the published models were trained.
  growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  growth = growth / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
  far = np.minimum(exact + growth.astype(np.int32), num_buckets - 1)
  return (offset + np.where(distance < exact, distance, far)).astype(np.int32)


def _of_neighbors(rng, shape, dtype=jnp.float32, *, bias, buckets):
  """[num_buckets, H]: a bias in favour of the tokens 1, then 2 or 3, 4 to 7, 8 to 15 away.

  In turns: with buckets of both sides the first head looks at the token before, the second at the
  one after, the third at two and three before, and so on.
  """
  del rng
  table, sides = np.zeros(shape, np.float32), (-1, 1) if buckets(1) != buckets(0) else (-1,)
  for head in range(shape[1]):
    near = 2 ** (head // len(sides) % 4)
    table[buckets(sides[head % len(sides)] * np.arange(near, 2 * near)), head] = bias
  return jnp.asarray(table, dtype)


class _Layer(nn.Module):
  """Fields and parts that both kinds of layer share; attributes as in T5."""

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
    # T5 does not scale its logits: the initialiser of the queries does.
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

  def __call__(self, x, *, bias, mask, deterministic):
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

  def __call__(self, x, cross_key, cross_value, *, bias, mask, cross_mask, cached=None,
               deterministic=True):
    """[B, T, D] -> [B, T, D], and the keys and values that the self-attention looked at.

    cross_key, cross_value: from cross_keys_values. cached: (key, value, place)
    with keys and values [B, H, M, head_dim]; the new ones are written over
    those from place on.
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

  def cross_keys_values(self, encoded):
    """[B, K, C] to key and value, each [B, H, K, head_dim]."""
    return tuple(map(_swap, self.cross_attention.keys_values(encoded)))


def _swap(x):
  """[B, K, H, head_dim] to [B, H, K, head_dim], as attention computes, and back."""
  return x.swapaxes(1, 2)


OPTIONS = WIDTHS | WRITER | {
    'head_dim': size('Width of an attention head.'),
    'neighbor_bias': Option(None, 'At the start, how much heads favour neighbouring words. None: '
                            'not, as published; the order of words then counts little until it is '
                            'learned.', kind=float, low=0)}

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
  """Encoder and decoder of T5; parameters exist only for the part that is used.

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
    neighbor_bias: of relative positions at the start: how much each head favours its neighbours,
      see `_of_neighbors`; None: small random biases, as published.
    gated: gated tanh-GELU MLPs (1.1) or ReLU ones (1.0).
    tie_word_embeddings: whether the embedding is the output layer as well (1.0).
    scale_decoder_outputs: divide by sqrt(D) before the output layer (1.0).
    layer_norm_epsilon: added to the mean square in the norms.
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
    """Raises UserError for fields that mean nothing, or not together."""
    sizes = ['vocab_size', 'hidden_dim', 'head_dim', 'num_heads', 'mlp_dim', 'num_layers',
             'relative_attention_num_buckets', 'relative_attention_max_distance']
    if self.num_decoder_layers:  # 0: an encoder alone
      sizes.append('num_decoder_layers')
    check_sizes('T5', self, *sizes)
    buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    # Half of them hold one distance each; the encoder has two sides.
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

  def __call__(self, tokens, mask, decoder_tokens, *, deterministic=True):
    """Teacher-forced logits [B, T, V]: `decode` on what `encode` gives."""
    encoded = self.encode(tokens, mask, deterministic=deterministic)
    return self.decode(decoder_tokens, encoded, mask, deterministic=deterministic)

  def encode(self, tokens, mask, *, deterministic=True):
    """Tokens int32 [B, L], mask bool [B, L] (True for real tokens) -> [B, L, D]."""
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

  def decode(self, tokens, encoded, encoded_mask, *, deterministic=True):
    """Teacher-forced logits: row t sees tokens 0..t and all of the encoded stream.

    Args:
      tokens: int32 [B, T], the start token first.
      encoded: [B, K, C], the encoder's output or any other stream.
      encoded_mask: bool [B, K], True where there is something.
      deterministic: no dropout.

    Returns:
      float32 logits [B, T, V]; row t is about token t + 1.
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

  def init_cache(self, encoded, encoded_mask, max_length, num_beams=1):
    """Cache for up to max_length calls of `decode_step` on an encoded stream [B, K, C].

    The beams of a row, W of them, share one cache. Whichever tokens a beam goes
    on from, their keys stay where they were written; `ancestors` says where.

    Returns:
      dict of `index` int32, the number of tokens so far; `ancestors` int32
      [B, W, max_length], the beam that wrote each token of a beam's text; `key`
      and `value`, of each layer [B, H, max_length * W, head_dim], ordered by
      token, then beam; `cross_key` and `cross_value`, of each layer
      [B, H, K, head_dim]; `cross_mask` bool [B, K].
    """
    layer, layers = self._unstacked()
    cross = [layer.apply(variables, encoded, method='cross_keys_values') for variables in layers]
    shape = (len(encoded), self.num_heads, max_length * num_beams, self.head_dim)
    # An array a layer: a slice of one array for all would be copied at every step.
    empty = tuple(jnp.zeros(shape, cross[0][0].dtype) for _ in layers)
    return {'index': jnp.zeros((), jnp.int32),
            'ancestors': jnp.zeros((len(encoded), num_beams, max_length), jnp.int32),
            'key': empty, 'value': empty, 'cross_key': tuple(key for key, _ in cross),
            'cross_value': tuple(value for _, value in cross), 'cross_mask': encoded_mask}

  def decode_step(self, token, cache, layers=None):
    """One token on.

    Args:
      token: int32 [B * W], the last one of each beam.
      cache: from `init_cache` or the step before.
      layers: what `unstack_decoder` gives; else the parameters are taken apart here.

    Returns:
      float32 logits [B * W, V] about the next token, and the cache with this one.
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

    layer, sliced = self._unstacked(layers)
    x, written = self.token_embedding(token.reshape(batch, beams)), []
    for i, variables in enumerate(sliced):
      x, keys_values = layer.apply(
          variables, x, cache['cross_key'][i], cache['cross_value'][i], bias=bias, mask=mask,
          cross_mask=cross_mask, cached=(cache['key'][i], cache['value'][i], index * beams))
      written.append(keys_values)
    key, value = zip(*written)
    logits = self._logits(self.decoder_norm(x))
    return logits.reshape(batch * beams, -1), {
        **cache, 'index': index + 1, 'ancestors': ancestors, 'key': key, 'value': value}

  def unstack_decoder(self):
    """The variables of each decoder layer, to be taken apart once and not at every step."""
    return self._unstacked()[1]

  def _unstacked(self, layers=None):
    """A decoder layer, unbound, and the variables of each (as given, if they are)."""
    layer, stacked = self.decoder_layers.unbind()
    # Few queries: nothing to gain from flash attention.
    layer = layer.clone(attention_implementation='xla')
    return layer, layers or tuple(jax.tree.map(lambda x: x[i], stacked)
                                  for i in range(self.num_decoder_layers))

  def _relative_bias(self, *, bidirectional):
    init = nn.initializers.normal(self.hidden_dim ** -0.5)
    if self.neighbor_bias is not None:
      buckets = functools.partial(self._buckets, bidirectional=bidirectional)
      init = functools.partial(_of_neighbors, bias=self.neighbor_bias, buckets=buckets)
    return nn.Embed(self.relative_attention_num_buckets, self.num_heads, embedding_init=init)

  def _buckets(self, relative, *, bidirectional):
    return relative_position_buckets(
        relative, bidirectional=bidirectional, num_buckets=self.relative_attention_num_buckets,
        max_distance=self.relative_attention_max_distance)

  def _bias(self, relative_bias, buckets):
    """Buckets [Q, K] to bias [1, H, Q, K], the same in every layer."""
    return relative_bias(buckets).transpose(2, 0, 1)[None]

  def _logits(self, x):
    if self.scale_decoder_outputs:
      x = x * jnp.asarray(self.hidden_dim ** -0.5, x.dtype)
    if self.tie_word_embeddings:
      embedding = self.token_embedding.embedding.astype(x.dtype)
      return jnp.dot(x, embedding.T, preferred_element_type=jnp.float32)
    return self.lm_head(x)


def _float32_dot_general(*args, **kwargs):
  return jax.lax.dot_general(*args, **kwargs | {'preferred_element_type': jnp.float32})


def start_writing(module, variables, encoded, encoded_mask, max_length, num_beams=1):
  """A step function and its first cache, as `generate` takes them.

  Args:
    module, variables: a T5 and its parameters.
    encoded: [B, K, C], the encoder's output or any other stream.
    encoded_mask: bool [B, K], True where there is something.
    max_length: the most tokens that will be written.
    num_beams: W, texts that a row has at a time.

  Returns:
    (token int32 [B * W], cache) -> (logits [B * W, V], cache), and a cache.
  """
  layers = module.apply(variables, method='unstack_decoder')

  def step(token, cache):
    return module.apply(variables, token, cache, layers, method='decode_step')

  return step, module.apply(variables, encoded, encoded_mask, max_length, num_beams,
                            method='init_cache')
