"""Text from a decoder with a cache: greedy, beam search, sampling; each one compiled loop.

    t5, variables = xmodal.pretrained.load('google/flan-t5-base')

    @jax.jit
    def write(variables, tokens, mask):                  # int32 and bool [B, L]
      encoded = t5.apply(variables, tokens, mask, method='encode')
      step_fn, cache = start_writing(t5, variables, encoded, mask, 32, num_beams=4)
      return beam_search(step_fn, cache, start_token=jnp.zeros(len(tokens)), eos_token=1,
                         pad_token=0, max_length=32)[0][:, 0]           # int32 [B, 32]

With num_beams=1 the same two lines serve `greedy(step_fn, cache, ...)` and
`sample(step_fn, cache, jax.random.key(0), ..., top_p=0.9)`; start_writing is in
`models.towers.t5`. A loop ends when every row has ended. Arguments of all three:

  step_fn: (token int32 [N], cache) -> (logits [N, V] of the next token, cache).
  cache: pytree, the initial cache of step_fn.
  start_token: int32 [B], the first input token of each row's decoder.
  eos_token: int, the token that ends a text; -1: none.
  pad_token: int, fills a row after its end.
  max_length: T, maximum number of tokens of a text, including its end token.

`greedy` and `sample` also take

  on_step: called on the host after each step with the number of steps and the tokens so far, int32
    [B, T], as numpy arrays; None: nothing is called.

N is B, or B * W in a search with W beams. For a search the cache is a dict, and its
`ancestors`, int32 [B, W, T], give the beam that wrote each token of a beam's text.
When beams continue other beams, `beam_search` reorders only these indices, and keys
and values are not moved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped
import numpy as np

from xmodal.errors import UserError

# Below every sum of log-probabilities. The same value as in transformers, whose results depend on
# it.
_NEVER = -1e9


def greedy(step_fn: Callable, cache, *, start_token: Shaped[Array, ' B'], eos_token: int,
           pad_token: int, max_length: int, on_step: Callable | None = None
           ) -> tuple[Int[Array, 'B {max_length}'], Float[Array, ' B']]:
  """Takes the most probable token at each step; see the top of this file.

  Returns:
    (tokens, log_probability): tokens int32 [B, T] without the start token;
    float32 [B], the sum over the row's tokens, including its end token.
  """
  return _write(step_fn, cache, lambda logits, _: _argmax(logits), start_token, eos_token,
                pad_token, max_length, on_step)


def sample(step_fn: Callable, cache, rng: Key[Array, ''] | Key[Array, ' B'], *,
           start_token: Shaped[Array, ' B'], eos_token: int, pad_token: int, max_length: int,
           temperature: float = 1., top_k: int = 0, top_p: float = 1.,
           on_step: Callable | None = None
           ) -> tuple[Int[Array, 'B {max_length}'], Float[Array, ' B']]:
  """Samples tokens; see the top of this file, and `filter_logits` for temperature, top_k, top_p.

  Args:
    rng: jax.random key, or one key per row [B], which makes a row's tokens independent of the
      other rows. Each step uses a key folded from it.

  Returns:
    (tokens, log_probability) as in `greedy`; the probability is the model's, without
    temperature and filters.
  """
  def choose(logits, step):
    logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if rng.ndim:
      keys = jax.vmap(jax.random.fold_in, (0, None))(rng, step)
      return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return jax.random.categorical(jax.random.fold_in(rng, step), logits).astype(jnp.int32)

  return _write(step_fn, cache, choose, start_token, eos_token, pad_token, max_length, on_step)


def filter_logits(logits: Float[Array, 'B V'], *, temperature: float = 1., top_k: int = 0,
                  top_p: float = 1.) -> Float[Array, 'B V']:
  """Logits [B, V] / temperature, -inf for excluded tokens, like the warpers of transformers.

  Args:
    logits: float [B, V].
    temperature: above 0; below 1 sharpens.
    top_k: keeps the k most probable tokens, and any ties with the last; 0: all.
    top_p: of these, keeps the fewest tokens whose total probability reaches top_p
      (arXiv:1904.09751), at least one; 1: all.

  Raises:
    UserError: a value out of range.
  """
  if not temperature > 0:
    raise UserError(f'temperature={temperature}: wanted above 0; greedy takes the likeliest token')
  if top_k < 0:
    raise UserError(f'top_k={top_k}: wanted 1 or more, or 0 for all')
  if not 0 <= top_p <= 1:
    raise UserError(f'top_p={top_p}: wanted 0 to 1')
  logits = logits.astype(jnp.float32) / temperature
  if top_k:
    least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    out = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    out = out.at[:, -1].set(False)
    out = jnp.put_along_axis(jnp.zeros_like(out), order, out, axis=-1, inplace=False)
    logits = jnp.where(out, -jnp.inf, logits)
  return logits


def _write(step_fn, cache, choose, start_token, eos_token, pad_token, max_length, on_step):
  """Decoding loop with one text per row; choose(logits [B, V], step) -> int32 [B]."""
  start_token = jnp.asarray(start_token, jnp.int32)
  batch = start_token.shape[0]
  tokens = jnp.full((batch, max_length), pad_token, jnp.int32)

  def advance(state):
    step, _, token, done, tokens, total, cache = state
    logits, cache = step_fn(token, cache)
    logits = logits.astype(jnp.float32)
    token = choose(logits, step)
    log_probability = (jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
                       - jax.nn.logsumexp(logits, axis=-1))
    token = jnp.where(done, pad_token, token)
    total = total + jnp.where(done, 0., log_probability)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
    if on_step is not None:
      jax.debug.callback(on_step, step + 1, tokens)
    done |= token == eos_token
    goes_on = (step + 1 < max_length) & ~jnp.all(done)
    return step + 1, goes_on, token, done, tokens, total, cache

  # Whether to go on is part of the state: a condition over all devices would stop them all.
  state = (jnp.int32(0), jnp.bool_(max_length > 0), start_token, jnp.zeros(batch, bool), tokens,
           jnp.zeros(batch), cache)
  *_, tokens, total, _ = jax.lax.while_loop(lambda state: state[1], advance, state)
  return tokens, total


def _argmax(x):
  """jnp.argmax over the last axis, four times as fast as XLA's on a CPU."""
  places = jnp.arange(x.shape[-1], dtype=jnp.int32)
  best = jnp.where(x == x.max(-1, keepdims=True), places, x.shape[-1] - 1)
  return best.min(-1)


def beam_search(step_fn: Callable, cache: dict, *, start_token: Shaped[Array, ' B'],
                eos_token: int, pad_token: int, max_length: int, num_return: int = 1,
                length_penalty: float = 1., early_stopping: bool | str = False
                ) -> tuple[Int[Array, 'B {num_return} {max_length}'],
                           Float[Array, 'B {num_return}'], Float[Array, 'B {num_return}']]:
  """Beam search with the cache's W beams; see the top of this file.

  Gives the same tokens as `generate(num_beams=W, do_sample=False)` of transformers.
  A text's score is its log-probability / its length ** length_penalty.

  Args:
    num_return: R, texts per row, 1 to W.
    length_penalty: above 0 favours long texts, below 0 short ones.
    early_stopping: when a row ends. True: once it has W finished texts. False: once
      the best running beam, if it ended now, would not be among them. 'never': once
      no continuation of it could be among them.

  Returns:
    (tokens, score, log_probability): int32 [B, R, T] without the start token,
    best first; float32 [B, R]; float32 [B, R], the sum over the text's tokens.

  Raises:
    UserError: num_return or early_stopping out of range.
  """
  beams = cache['ancestors'].shape[1]
  if not 1 <= num_return <= beams:
    raise UserError(f'num_return={num_return}: wanted 1 to {beams}, the beams that there are')
  if early_stopping not in (True, False, 'never'):
    raise UserError(f"early_stopping={early_stopping!r}: wanted True, False or 'never'")
  search = _BeamSearch(step_fn, eos_token, pad_token, max_length, beams, length_penalty,
                       early_stopping)
  done = jax.lax.while_loop(lambda state: state['goes_on'], search.advance,
                            search.start(cache, jnp.asarray(start_token, jnp.int32)))
  score = done['score'][:, :num_return]
  return (done['whole'][:, :num_return], score,
          score * search.norms[done['length'][:, :num_return]])


class _BeamSearch:
  """State of a search per row: the running beams and the best W finished texts."""

  def __init__(self, step_fn, eos_token, pad_token, max_length, beams, length_penalty,
               early_stopping):
    self._step_fn, self._beams = step_fn, beams
    self._eos_token, self._pad_token, self._max_length = eos_token, pad_token, max_length
    self._early_stopping = early_stopping
    # In float64, then rounded, to equal Python's **: a float32 power would differ in the last bit.
    lengths = np.maximum(np.arange(max_length + 1), 1).astype(np.float64)
    self.norms = jnp.asarray(lengths ** length_penalty, jnp.float32)
    # If longer texts score higher, the best case is the maximum length.
    self._longest = early_stopping == 'never' and length_penalty > 0

  def start(self, cache, start_token):
    batch, beams = start_token.shape[0], self._beams
    texts = jnp.full((batch, beams, self._max_length), self._pad_token, jnp.int32)
    nothing = jnp.full((batch, beams), _NEVER)
    return {
        'step': jnp.int32(0), 'goes_on': jnp.bool_(self._max_length > 0), 'cache': cache,
        'token': jnp.repeat(start_token, beams),
        # All beams start equal: only the first counts.
        'running': texts, 'log_probability': nothing.at[:, 0].set(0.),
        'whole': texts, 'score': nothing, 'length': jnp.zeros((batch, beams), jnp.int32),
        'is_whole': jnp.zeros((batch, beams), bool), 'hopeful': jnp.ones((batch, 1), bool)}

  def advance(self, state):
    step, beams = state['step'], self._beams
    logits, cache = self._step_fn(state['token'], state['cache'])
    log_probability, parent, token = self._continuations(logits, state['log_probability'])
    texts = jnp.take_along_axis(state['running'], parent[..., None], axis=1)
    texts = jax.lax.dynamic_update_slice_in_dim(texts, token[..., None], step, axis=2)
    ends = (token == self._eos_token) | (step + 1 >= self._max_length)

    running_log_probability, best = jax.lax.top_k(log_probability + ends * _NEVER, beams)
    parent, token = (jnp.take_along_axis(x, best, axis=1) for x in (parent, token))
    cache = {**cache, 'ancestors': jnp.take_along_axis(
        cache['ancestors'], parent[..., None], axis=1)}
    state = {**state, **self._keep_best(state, log_probability, texts, ends)}
    state |= {'step': step + 1, 'cache': cache, 'token': token.reshape(-1),
              'running': jnp.take_along_axis(texts, best[..., None], axis=1),
              'log_probability': running_log_probability}
    state['hopeful'] = self._may_improve(state)
    goes_on = jnp.any(state['hopeful']) & ~jnp.all(ends)
    if self._early_stopping is True:
      goes_on &= ~jnp.all(state['is_whole'])
    return state | {'goes_on': goes_on}

  def _continuations(self, logits, log_probability):
    """The best 2 W next tokens of all beams: log-probability, beam and token, [B, 2 W].

    At most W of them end a text, so that W beams can continue.
    """
    logits, beams = logits.astype(jnp.float32), self._beams
    # Select per beam first: sorting all beams at once is several times slower.
    count = min(2 * beams, logits.shape[-1])
    top, token = jax.lax.top_k(logits, count)
    top = (top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).reshape(-1, beams, count)
    top = (top + log_probability[..., None]).reshape(-1, beams * count)
    top, place = jax.lax.top_k(top, 2 * beams)
    return top, place // count, jnp.take_along_axis(
        token.reshape(-1, beams * count), place, axis=1)

  def _keep_best(self, state, log_probability, texts, ends):
    """The best W of the finished texts so far and those that end now."""
    beams, length = self._beams, state['step'] + 1
    # The other W candidates may only continue, not end.
    ends = ends & (jnp.arange(2 * beams) < beams)
    score = log_probability / self.norms[length]
    if self._early_stopping is True:
      score += jnp.all(state['is_whole'], axis=1, keepdims=True) * _NEVER
    score += ~state['hopeful'] * _NEVER
    score += ~ends * _NEVER
    score, best = jax.lax.top_k(jnp.concatenate([state['score'], score], axis=1), beams)

    def pick(old, new):
      both = jnp.concatenate([old, new], axis=1)
      return jnp.take_along_axis(both, best.reshape(best.shape + (1,) * (both.ndim - 2)), axis=1)

    return {'score': score, 'whole': pick(state['whole'], texts),
            'is_whole': pick(state['is_whole'], ends),
            'length': pick(state['length'], jnp.full_like(ends, length, jnp.int32))}

  def _may_improve(self, state):
    """bool [B, 1]: whether the best running beam can still beat a row's worst finished text."""
    length = self._max_length if self._longest else state['step']
    best = state['log_probability'][:, :1] / self.norms[length]
    worst = jnp.where(state['is_whole'], state['score'].min(1, keepdims=True), _NEVER)
    return state['hopeful'] & jnp.any(best > worst, axis=1, keepdims=True)
