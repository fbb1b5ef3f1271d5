"""Generated text against transformers' generate, through the files that it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
import torch
import transformers
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from xmodal import pretrained
from xmodal.errors import UserError
from xmodal.models.generate import beam_search, filter_logits, greedy, sample
from xmodal.models.towers.t5 import start_writing

torch.set_num_threads(2)
PROMPTS, LONGEST, NEW, VOCAB = 50, 12, 14, 53
VERSIONS = {
    '1.0': {'feed_forward_proj': 'relu'},
    '1.1': {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
}


@pytest.fixture(scope='module', params=VERSIONS)
def models(request, tmp_path_factory):
  """The PyTorch model, and ours with its parameters read from the saved file."""
  folder = tmp_path_factory.mktemp('t5')
  torch.manual_seed(1)
  config = transformers.T5Config(
      vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=28, num_layers=2, num_decoder_layers=2,
      num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=12,
      decoder_start_token_id=0, **VERSIONS[request.param])
  theirs = transformers.T5ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter += (0.3 if request.param == '1.0' else 0.2) * torch.randn(parameter.shape)
    # Sharp distributions and varied texts, so that rounding decides nothing.
    if request.param == '1.0':
      theirs.shared.weight *= 0.1
      theirs.decoder.final_layer_norm.weight *= 40
    else:
      theirs.lm_head.weight.normal_()
  theirs.save_pretrained(folder)
  return theirs, *pretrained.load(str(folder))


@pytest.fixture(scope='module')
def prompts():
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, LONGEST + 1, PROMPTS)
  lengths[0] = LONGEST
  mask = np.arange(LONGEST) < lengths[:, None]
  return np.where(mask, rng.integers(2, VOCAB, mask.shape), 0), mask


def generate_theirs(model, prompts, **options):
  tokens, mask = prompts
  return model.generate(
      inputs=torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=NEW,
      pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options)


def padded(sequences, eos):
  """Tokens [..., NEW] without the start token, 0 after the end (their beam search repeats eos)."""
  tokens = np.zeros((len(sequences), NEW), int)
  tokens[:, :sequences.shape[1] - 1] = sequences[:, 1:]
  return np.where(np.arange(NEW) < lengths_of(tokens, eos)[:, None], tokens, 0)


def lengths_of(tokens, eos):
  """Tokens of each text [..., NEW], its end token among them."""
  return np.where((tokens == eos).any(-1), (tokens == eos).argmax(-1) + 1, NEW)


def write(models, prompts, method, num_beams=1, **options):
  _, module, variables = models
  tokens, mask = prompts

  @jax.jit
  def run(variables, tokens, mask):
    encoded = module.apply(variables, tokens, mask, method='encode')
    step_fn, cache = start_writing(module, variables, encoded, mask, NEW, num_beams)
    return method(step_fn, cache, start_token=jnp.zeros(len(tokens)), pad_token=0, max_length=NEW,
                  **options)

  return run(variables, tokens, mask)


@pytest.fixture(scope='module')
def ends(models, prompts):
  """Tokens that this model generates: one often and one rarely."""
  said = generate_theirs(models[0], prompts, do_sample=False, eos_token_id=-1).sequences[:, 1:]
  texts_with = [(said == token).any(1).sum() for token in range(VOCAB)]
  by_frequency = np.argsort(texts_with)[::-1]
  return [int(token) for token in by_frequency if token][:7:6]


@pytest.mark.parametrize('which', [0, 1])
def test_greedy_equals_transformers(models, prompts, ends, which):
  eos = ends[which]
  out = generate_theirs(models[0], prompts, do_sample=False, eos_token_id=eos)
  expected = padded(out.sequences, eos)
  lengths = lengths_of(expected, eos)
  assert len(set(lengths)) > 3
  ours, log_probability = write(models, prompts, greedy, eos_token=eos)
  np.testing.assert_array_equal(ours, expected)
  scores = models[0].compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
  scores = np.where(np.arange(scores.shape[1]) < lengths[:, None], scores, 0)
  np.testing.assert_allclose(log_probability, scores.sum(1), rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize('models, num_beams, which, length_penalty, early_stopping', [
    ('1.0', 2, 0, 1.0, False), ('1.0', 2, 1, 0.0, 'never'), ('1.0', 3, 1, -1.0, True),
    ('1.0', 4, 0, 0.6, True), ('1.0', 4, 1, 1.5, 'never'), ('1.1', 2, 0, 0.6, True),
    ('1.1', 3, 0, 2.0, 'never'), ('1.1', 3, 1, 1.0, False), ('1.1', 4, 0, -0.5, False)],
    indirect=['models'])
def test_beam_search_equals_transformers(
    models, prompts, ends, num_beams, which, length_penalty, early_stopping):
  """All W texts of each row, best first."""
  eos = ends[which]
  options = dict(length_penalty=length_penalty, early_stopping=early_stopping)
  out = generate_theirs(models[0], prompts, do_sample=False, num_beams=num_beams,
                        num_return_sequences=num_beams, eos_token_id=eos, **options)
  expected = padded(out.sequences, eos).reshape(PROMPTS, num_beams, NEW)
  lengths = lengths_of(expected, eos)
  assert len(set(lengths.ravel())) > 2
  tokens, score, log_probability = write(models, prompts, beam_search, num_beams, eos_token=eos,
                                         num_return=num_beams, **options)
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_allclose(score.ravel(), out.sequences_scores, rtol=1e-4, atol=5e-4)
  np.testing.assert_allclose(log_probability, score * lengths ** length_penalty, rtol=1e-4)


# Without a model: arguments of search and sampling


def chain(table):
  """A decoder that depends only on the last token: logits table[token]."""
  return lambda token, cache: (jnp.asarray(table)[token], cache)


@pytest.mark.parametrize('method', ['greedy', 'sample', 'beam_search'])
def test_the_loop_stops_when_every_row_has_ended(method):
  calls = []

  def step_fn(token, cache):  # counts up to the end token, 5
    jax.debug.callback(lambda: calls.append(1))
    return 100. * jax.nn.one_hot(token + 1, 9), cache

  methods = {'greedy': greedy, 'beam_search': beam_search,
             'sample': lambda *args, **kwargs: sample(*args, jax.random.key(0), **kwargs)}
  tokens, *_ = jax.jit(lambda start: methods[method](
      step_fn, {'ancestors': jnp.zeros((2, 1, 50), int)}, start_token=start, eos_token=5,
      pad_token=0, max_length=50))(jnp.array([1, 3]))
  jax.effects_barrier()
  np.testing.assert_array_equal(np.reshape(tokens, (2, 50))[:, :5], [[2, 3, 4, 5, 0],
                                                                     [4, 5, 0, 0, 0]])
  assert len(calls) == 4 and not np.reshape(tokens, (2, 50))[:, 5:].any()


@pytest.mark.parametrize('method', [greedy, lambda *args, **kwargs: sample(
    *args, jax.random.key(0), **kwargs)])
def test_the_texts_so_far_are_told(method):
  told = []
  step_fn = chain(100. * np.eye(6, k=1))  # counts up to the end token, 5
  jax.jit(lambda start: method(
      step_fn, {}, start_token=start, eos_token=5, pad_token=0, max_length=9,
      on_step=lambda step, tokens: told.append((int(step), tokens[:, :3].tolist()))))(
          jnp.array([2, 3]))
  jax.effects_barrier()
  assert told == [(1, [[3, 0, 0], [4, 0, 0]]), (2, [[3, 4, 0], [4, 5, 0]]),
                  (3, [[3, 4, 5], [4, 5, 0]])]


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 12, 0.9), (0.5, 1, 0.5), (1.0, 0, 0.0),
    (1.0, 500, 0.99)])
def test_filtered_logits_equal_transformers(temperature, top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(40, 59), scale=3).astype(np.float32)
  # Ties at the k-th place, at the edge of the nucleus, and everywhere.
  logits[20:30] = np.round(logits[20:30])
  logits[39] = 1.5
  theirs = torch.tensor(logits)
  for warp in ([TemperatureLogitsWarper(temperature)] + ([TopKLogitsWarper(top_k)] if top_k else [])
               + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])):
    theirs = warp(None, theirs)
  theirs = theirs.numpy()
  ours = jax.jit(lambda x: filter_logits(
      x, temperature=temperature, top_k=top_k, top_p=top_p))(logits)
  assert np.isfinite(ours).any(1).all()
  np.testing.assert_allclose(ours[:20], theirs[:20], rtol=1e-6)
  # An unstable sort decides which of several equals are kept, but not how many.
  np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6)


def test_samples_are_as_frequent_as_their_probabilities():
  """Two consecutive tokens: samples of one step must not depend on another's."""
  rows, options = 20_000, dict(temperature=0.8, top_k=4, top_p=0.95)
  table = np.random.default_rng(3).normal(size=(6, 6)).astype(np.float32)
  tokens, log_probability = jax.jit(lambda key: sample(
      chain(table), (), key, start_token=jnp.full(rows, 2), eos_token=-1, pad_token=0,
      max_length=2, **options))(jax.random.key(0))
  warped = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(4)(None, torch.tensor(table) / 0.8))
  transition = warped.double().softmax(-1).numpy()
  expected = rows * transition[2][:, None] * transition
  seen = np.zeros((6, 6))
  np.add.at(seen, tuple(tokens.T), 1)
  assert not seen[expected == 0].any()
  possible = expected > 0
  assert possible.sum() > 9
  assert stats.chisquare(seen[possible], expected[possible]).pvalue > 0.01
  # The probability of the model, before filtering.
  own = torch.tensor(table).log_softmax(-1).numpy()
  np.testing.assert_allclose(
      log_probability, own[2, tokens[:, 0]] + own[tokens[:, 0], tokens[:, 1]], rtol=1e-4)


@pytest.mark.parametrize('models', ['1.0'], indirect=True)
def test_samples_of_a_model_differ_by_key_and_end_with_their_end_token(models, prompts, ends):
  keys = jax.random.key(0), jax.random.key(0), jax.random.key(1)
  drawn = np.stack(write(models, prompts, lambda *args, **kwargs: [
      sample(*args, key, **kwargs)[0] for key in keys], eos_token=ends[0]))
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert (drawn[0] != drawn[2]).any()
  after = np.arange(NEW) >= lengths_of(drawn, ends[0])[..., None]
  assert after.any() and not drawn[after].any()


@pytest.mark.parametrize('method, options, message', [
    (filter_logits, dict(temperature=0), 'temperature=0: wanted above 0'),
    (filter_logits, dict(top_k=-1), 'top_k=-1: wanted 1 or more'),
    (filter_logits, dict(top_p=1.5), 'top_p=1.5: wanted 0 to 1'),
    (beam_search, dict(num_return=4), 'num_return=4: wanted 1 to 3'),
    (beam_search, dict(early_stopping='sometimes'), "early_stopping='sometimes': wanted True")])
def test_what_cannot_be_asked(method, options, message):
  with pytest.raises(UserError, match=message):
    if method is filter_logits:
      filter_logits(jnp.zeros((1, 4)), **options)
    else:
      beam_search(chain(np.eye(4)), {'ancestors': jnp.zeros((1, 3, 5), int)},
                  start_token=jnp.zeros(1), eos_token=1, pad_token=0, max_length=5, **options)
