"""Text from a decoder with a cache."""

import jax
import jax.numpy as jnp


def greedy(step_fn, cache, *, start_token, eos_token, pad_token, max_length):
  """The most probable token at each step, until every row has ended.

  One `lax.while_loop`: wrap the call in `jax.jit`.

  Args:
    step_fn: (token int32 [B], cache) -> (logits [B, V], cache).
    cache: pytree, as step_fn takes it first.
    start_token: int32 [B], what each row's decoder begins with.
    eos_token: int, ends a row.
    pad_token: int, fills a row after its end.
    max_length: T, the most tokens a row gets, its end token among them.

  Returns:
    (tokens, log_probability): tokens int32 [B, T] without the start token;
    float32 [B], the sum over the row's tokens, its end token among them.
  """
  start_token = jnp.asarray(start_token, jnp.int32)
  batch = start_token.shape[0]
  tokens = jnp.full((batch, max_length), pad_token, jnp.int32)

  def unfinished(state):
    step, _, done, *_ = state
    return (step < max_length) & ~jnp.all(done)

  def advance(state):
    step, token, done, tokens, total, cache = state
    logits, cache = step_fn(token, cache)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_probability = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    token = jnp.where(done, pad_token, token)
    total = total + jnp.where(done, 0., log_probability)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
    return step + 1, token, done | (token == eos_token), tokens, total, cache

  state = (jnp.int32(0), start_token, jnp.zeros(batch, bool), tokens, jnp.zeros(batch), cache)
  _, _, _, tokens, total, _ = jax.lax.while_loop(unfinished, advance, state)
  return tokens, total
