"""The layers that bring pictures and texts into one space."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from xmodal.models.pooling import AttentionPool
from xmodal.tasks.retrieval.losses import normalise, pair_logits


class RetrievalHead(nn.Module):
  """Projects pictures and texts into one space and compares all pairs of a batch.

  Attributes:
    embedding_dim: D, width of that space.
    loss: 'sigmoid' or 'softmax' (no bias); sets the initial scale and bias.
  """

  embedding_dim: int
  loss: str

  def setup(self):
    self.vision_pool, self.text_pool = AttentionPool(), AttentionPool()
    self.vision_projection = nn.Dense(self.embedding_dim, use_bias=False)
    self.text_projection = nn.Dense(self.embedding_dim, use_bias=False)
    # Initial values of SigLIP and CLIP.
    self.log_scale = self.param('log_scale', nn.initializers.constant(
        np.log(10 if self.loss == 'sigmoid' else 1 / 0.07)), ())
    if self.loss == 'sigmoid':
      self.score_bias = self.param('score_bias', nn.initializers.constant(-10.0), ())

  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> dict[str, Float[Array, 'B B'] | Int[Array, 'B L']]:
    """Returns {'logits': float32 [B, B], pictures by texts, 'tokens': int32 [B, L], the texts}."""
    tokens = features['captions']
    chosen = jnp.zeros(tokens.shape[0], jnp.int32)
    if tokens.shape[1] > 1 and not deterministic:
      share = jax.random.uniform(self.make_rng('dropout'), chosen.shape)
      chosen = (share * features['count']).astype(jnp.int32)
    tokens = jnp.take_along_axis(tokens, chosen[:, None, None], axis=1)[:, 0]
    bias = self.score_bias if self.loss == 'sigmoid' else 0.0
    logits = pair_logits(self._image(towers), self._text(towers, tokens), self.log_scale, bias)
    return {'logits': logits, 'tokens': tokens}

  def predict(self, towers, features: Mapping[str, Any]
              ) -> dict[str, Float[Array, 'B D'] | Float[Array, 'B C D']]:
    """Returns {'image': float32 [B, D], 'captions': float32 [B, C, D]}, all of length 1."""
    batch, captions, length = features['captions'].shape
    text = self._text(towers, features['captions'].reshape(batch * captions, length))
    return {'image': self._image(towers), 'captions': text.reshape(batch, captions, -1)}

  def _image(self, towers):
    vision = towers.vision()
    return normalise(self.vision_projection(self.vision_pool(vision.tokens, vision.mask)))

  def _text(self, towers, tokens):
    text = towers.text(tokens)
    return normalise(self.text_projection(self.text_pool(text.tokens, text.mask)))
