"""Losses of a student's outputs against those of its teacher (arXiv:1503.02531), for each example.

Each is 0 where both agree. Gradients go to the student alone.
"""

import collections
from collections.abc import Mapping
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from xmodal.models import capture
from xmodal.tasks.writing import text_mean


def divergence(logits: Float[Array, '*B K'], taught: Float[Array, '*B K']) -> Float[Array, '*B']:
  """KL divergence of softmax(taught) from softmax(logits), over the last axis."""
  taught = jax.lax.stop_gradient(taught.astype(jnp.float32))
  return optax.losses.kl_divergence_with_log_targets(
      jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(taught))


def divergence_of_text(logits: Float[Array, '*B T V'], taught: Float[Array, '*B T V'],
                       tokens: Int[Array, '*B T'], pad_id: int) -> Float[Array, '*B']:
  """The same of the next token, averaged over the tokens of a text."""
  return text_mean(divergence(logits, taught), tokens, pad_id)


def binary_divergence(logits: Float[Array, '*B'], taught: Float[Array, '*B']) -> Float[Array, '*B']:
  """KL divergence of sigmoid(taught) from sigmoid(logits)."""
  taught = jax.lax.stop_gradient(taught.astype(jnp.float32))
  chance = jax.nn.sigmoid(taught)
  return (optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), chance)
          - optax.sigmoid_binary_cross_entropy(taught, chance))


def unlikeness(tokens: Float[Array, 'B N D'], taught: Float[Array, 'B N E']) -> Float[Array, ' B']:
  """Mean squared difference of the tokens' cosine similarities.

  As in arXiv:1907.09682, with tokens in place of pictures; widths may differ.
  """
  def similarities(x):
    x = x.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return jnp.einsum('bnd,bmd->bnm', x, x)

  difference = similarities(tokens) - similarities(jax.lax.stop_gradient(taught))
  return (difference ** 2).mean((1, 2))


def last_tokens(state: Mapping) -> dict[str, list[Float[Array, 'B N D']]]:
  """The tokens after the last layer of each stack of the backbone but decoders.

  Args:
    state: what model.apply returned with models.capture.COLLECTION mutable.

  Returns:
    {path of the layers: tokens of each stream in each call}.
  """
  found = collections.defaultdict(list)
  for path, x in capture.found(state, r'^backbone/(?!.*decoder).*layers/tokens').items():
    if x.ndim == 4:
      found[re.sub(r'(/\d+)+$', '', path)].append(x[-1])
  return dict(found)


def likeness_loss(own: Mapping, taught: Mapping, batch_size: int) -> Float[Array, ' B'] | None:
  """Sum of `unlikeness` over stacks that both ran equally often; None if there are none."""
  pairs = [pair for stack, tokens in own.items() if len(tokens) == len(taught.get(stack, ()))
           for pair in zip(tokens, taught[stack])]
  alike = [unlikeness(x, y) for x, y in pairs
           if x.shape[:2] == y.shape[:2] and x.shape[0] == batch_size]
  return sum(alike) if alike else None
