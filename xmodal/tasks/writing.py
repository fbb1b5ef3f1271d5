"""Text generation shared by tasks: the loss of texts, and decoding with the T5 decoder.

Texts are token ids, int32 [B, T], with an end token and then padding; the
pad token starts a text, as in T5.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from xmodal.data.tokenizer import Tokenizer
from xmodal.models.generate import beam_search, greedy, sample


def teacher_forced_logits(towers, fused, tokens: Int[Array, 'B T'], pad_id: int
                          ) -> Float[Array, 'B T V']:
  """Decoder logits [B, T, V] of each token, given the true tokens before it."""
  start = jnp.full_like(tokens[:, :1], pad_id)
  return towers.decode(jnp.concatenate([start, tokens[:, :-1]], axis=1), fused)


def token_loss(logits: Float[Array, 'B T V'], tokens: Int[Array, 'B T'], pad_id: int
               ) -> Float[Array, ' B']:
  """Per-text cross-entropy, averaged over its tokens: float32 [B], 0 for an empty text."""
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  token_log_probability = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
  return text_mean(-token_log_probability, tokens, pad_id)


def text_mean(values: Float[Array, '*B T'], tokens: Int[Array, '*B T'], pad_id: int
              ) -> Float[Array, '*B']:
  """Mean of values over the tokens of a text; 0 for an empty text."""
  is_text = tokens != pad_id
  return (values * is_text).sum(-1) / jnp.maximum(is_text.sum(-1), 1)


def write(towers, fused, length: int, *, pad_id: int, eos_id: int, beams: int = 1,
          rng: Key[Array, '*B'] | None = None, on_step: Callable | None = None, **filters
          ) -> dict[str, Array]:
  """Generates texts of up to `length` tokens from fused tokens.

  Args:
    towers: a models.joint.SharedTowers.
    fused: a models.joint.Fused.
    length: maximum number of tokens.
    pad_id, eos_id: token ids.
    beams: beams of the search; 1: greedy, or sampling if rng is given.
    rng: samples tokens with `filters` (temperature, top_k, top_p; see
      models.generate.filter_logits); None: no sampling.
    on_step: see models.generate; a search with beams calls nothing.

  Returns:
    {'tokens': int32 [B, length], 'log_probability': float32 [B]}, as read_texts takes them.
  """
  step, cache = towers.decoder(fused, length, beams)
  options = dict(start_token=jnp.full(fused.text.shape[0], pad_id, jnp.int32), eos_token=eos_id,
                 pad_token=pad_id, max_length=length)
  if rng is not None:
    tokens, log_probability = sample(step, cache, rng, **options, **filters, on_step=on_step)
  elif beams == 1:
    tokens, log_probability = greedy(step, cache, **options, on_step=on_step)
  else:
    tokens, _, log_probability = (x[:, 0] for x in beam_search(step, cache, **options))
  return {'tokens': tokens, 'log_probability': log_probability}


def read_texts(tokenizer: Tokenizer, arrays: Mapping[str, np.ndarray]) -> list[tuple[str, float]]:
  """(text, probability) of each text from `write`."""
  return list(zip(tokenizer.decode(arrays['tokens']), np.exp(arrays['log_probability']).tolist()))


def read_number(text: str) -> float | None:
  """Parses a finite number from a text; None if it is not one."""
  try:
    number = float(text.replace(' ', ''))
  except ValueError:
    return None
  return number if np.isfinite(number) else None
