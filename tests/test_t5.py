"""T5 and decoding against transformers (PyTorch), through the files that it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from xmodal.errors import UserError
from xmodal.models.towers.t5 import T5, relative_position_buckets
from xmodal.pretrained.checkpoint import Checkpoint
from xmodal.pretrained.tensors import init_shapes

torch.set_num_threads(2)
VERSIONS = {
    '1.0': {'feed_forward_proj': 'relu'},
    '1.1': {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
}


@pytest.fixture(scope='module', params=VERSIONS)
def models(request, tmp_path_factory):
  """The PyTorch model, and ours with parameters read from its saved folder."""
  folder = tmp_path_factory.mktemp(f't5-{request.param}')
  torch.manual_seed(0)
  config = transformers.T5Config(
      vocab_size=37, d_model=20, d_kv=6, d_ff=28, num_layers=3, num_decoder_layers=2, num_heads=3,
      relative_attention_num_buckets=8, relative_attention_max_distance=12,
      decoder_start_token_id=0, **VERSIONS[request.param])
  model = transformers.T5ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.2 * torch.randn(parameter.shape)
  if request.param == '1.1':
    model.lm_head.weight = torch.nn.Parameter(torch.randn(37, 20) / 4)
  model.save_pretrained(folder)
  checkpoint = Checkpoint(str(folder))
  return model, checkpoint.module, checkpoint.load()[0]


def assert_close(ours, theirs):
  theirs = theirs.detach().numpy()
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def random_tokens(batch, length, seed=0):
  return np.random.default_rng(seed).integers(2, 37, (batch, length))


def padding_mask(lengths, longest):
  return np.arange(longest)[None] < np.array(lengths)[:, None]


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('num_buckets, max_distance', [(32, 128), (8, 12), (64, 1000)])
def test_buckets_equal_transformers(bidirectional, num_buckets, max_distance):
  relative = np.arange(-3000, 3001)
  kwargs = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
  theirs = T5Attention._relative_position_bucket(torch.tensor(relative), **kwargs)
  np.testing.assert_array_equal(relative_position_buckets(relative, **kwargs), theirs)


@pytest.mark.parametrize('lengths', [(17, 17), (17, 5, 1)])
def test_encoder_equals_transformers(models, lengths):
  theirs, module, params = models
  tokens, mask = random_tokens(len(lengths), 17), padding_mask(lengths, 17)
  ours = jax.jit(lambda p: module.apply(p, tokens, mask, method='encode'))(params)
  assert_close(ours, theirs.encoder(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state)


def test_teacher_forced_logits_equal_transformers(models):
  theirs, module, params = models
  tokens, mask = random_tokens(2, 11), padding_mask((11, 3), 11)
  answer = random_tokens(2, 19, seed=1)
  ours = jax.jit(module.apply)(params, tokens, mask, answer)
  assert_close(ours, theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask),
                            decoder_input_ids=torch.tensor(answer)).logits)


def test_cached_steps_equal_transformers_on_any_stream(models):
  theirs, module, params = models
  stream = np.random.default_rng(0).normal(size=(2, 7, 20)).astype(np.float32)
  mask, answer = padding_mask((7, 4), 7), random_tokens(2, 15)
  cache = jax.jit(lambda p: module.apply(p, stream, mask, 16, method='init_cache'))(params)
  step = jax.jit(lambda token, cache: module.apply(params, token, cache, method='decode_step'))
  rows = []
  for token in answer.T:
    logits, cache = step(token, cache)
    rows.append(logits)
  ours = np.stack(rows, axis=1)
  assert_close(ours, theirs(encoder_outputs=(torch.tensor(stream),),
                            attention_mask=torch.tensor(mask),
                            decoder_input_ids=torch.tensor(answer)).logits)


@pytest.mark.parametrize('models', ['1.0'], indirect=True)
def test_encoder_alone_has_no_decoder_parameters(models, tmp_path):
  theirs, module, params = models
  tokens, mask = random_tokens(2, 5), np.ones((2, 5), bool)
  shapes = init_shapes(module, tokens, mask, method='encode')
  names = shapes['params'].keys()
  assert names == {'token_embedding', 'encoder_relative_bias', 'encoder_layers', 'encoder_norm'}
  theirs.save_pretrained(tmp_path)
  alone = Checkpoint(str(tmp_path)).load(shapes=shapes)[0]['params']
  assert alone.keys() == names
  jax.tree.map(np.testing.assert_array_equal, alone, {n: params['params'][n] for n in names})


def test_bfloat16_gives_float32_logits_with_and_without_the_cache(models):
  _, module, params = models
  module = module.clone(dtype=jnp.bfloat16)
  tokens, mask = random_tokens(2, 5), np.ones((2, 5), bool)

  def run(params):
    encoded = module.apply(params, tokens, mask, method='encode')
    cache = module.apply(params, encoded, mask, 4, method='init_cache')
    return (encoded, module.apply(params, tokens, encoded, mask, method='decode'), cache,
            *module.apply(params, tokens[:, 0], cache, method='decode_step'))

  encoded, logits, cache, step_logits, next_cache = jax.eval_shape(run, params)
  assert encoded.dtype == cache['key'][0].dtype == cache['cross_value'][0].dtype == jnp.bfloat16
  assert logits.dtype == step_logits.dtype == jnp.float32
  assert next_cache == cache  # A loop can carry it.


def first_biases(asked):
  """Of the encoder and of the decoder: the table, and [H, 20, 20] of it, a query's in a row, by
  transformers' buckets."""
  tokens, mask = np.ones((1, 20), np.int32), np.ones((1, 20), bool)
  params = T5(9, 64, 8, 8, 16, 1, 1, neighbor_bias=asked).init(
      jax.random.key(0), tokens, mask, tokens)['params']
  places = torch.arange(20)
  for stack in ('encoder', 'decoder'):
    buckets = T5Attention._relative_position_bucket(places - places[:, None], stack == 'encoder')
    table = np.asarray(params[f'{stack}_relative_bias']['embedding'])
    yield table, table[buckets.numpy()].transpose(2, 0, 1)


def test_position_biases_begin_small_or_in_favour_of_neighbours():
  for table, _ in first_biases(None):
    assert np.std(table) == pytest.approx(0.125, rel=0.15)
  (_, encoder), (_, decoder) = first_biases(5.0)

  def favoured(row):
    assert set(row) <= {0, 5}
    return list(np.flatnonzero(row))

  assert [favoured(head[10]) for head in encoder] == [
      [9], [11], [7, 8], [12, 13], [3, 4, 5, 6], [14, 15, 16, 17], [0, 1, 2], [18, 19]]
  assert [favoured(head[10, :11]) for head in decoder[:4]] == [
      [9], [7, 8], [3, 4, 5, 6], [0, 1, 2]]


@pytest.mark.parametrize('models', ['1.1'], indirect=True)
def test_dropout_changes_the_logits_and_gradients_stay_finite_under_remat(models):
  _, module, params = models
  module = module.clone(dropout_rate=0.3, remat='full')
  tokens, mask = random_tokens(2, 5), padding_mask((5, 2), 5)

  @jax.jit
  def gradient(params, seed):
    return jax.grad(lambda p: module.apply(
        p, tokens, mask, tokens, deterministic=False, rngs={'dropout': seed}).var())(params)

  first, second = (gradient(params, jax.random.key(s, impl='rbg')) for s in (0, 1))
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert np.isfinite(a).all() and a.any() and not np.array_equal(a, b)


@pytest.mark.parametrize('models', ['1.1'], indirect=True)
def test_checkpoint_of_another_size_is_refused(models, tmp_path):
  theirs, module, _ = models
  theirs.save_pretrained(tmp_path)
  checkpoint = Checkpoint(str(tmp_path))
  with pytest.raises(UserError, match=r'weight is \[37, 20\], wanted \[36, 20\]'):
    checkpoint.load(module.clone(vocab_size=36))
  with pytest.raises(UserError, match=r'decoder\.block\.1'):
    checkpoint.load(module.clone(num_decoder_layers=1))
