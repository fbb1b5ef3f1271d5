"""The layers that answer: a classifier over the answer list, and the T5 decoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from xmodal.tasks import writing

_TOP = 5


class VQAHead(nn.Module):
  """Classifier and T5 decoder on the fused tokens of picture and question.

  Attributes:
    num_answers: size of the answer list; 0: no classifier.
    written: whether the decoder generates an answer.
    answer_length: maximum length of a written answer, in tokens.
    pad_id, eos_id: token ids; the pad token starts a text, as in T5.
    beams: beams of the search for the written answer; 1: greedy.
    dropout_rate: dropout before the classifier's logits.
  """

  num_answers: int
  written: bool
  answer_length: int
  pad_id: int
  eos_id: int
  beams: int = 1
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> dict[str, Array]:
    """Returns {'cls': logits [B, A], 'gen': logits [B, T, V]}, each only if its head is on."""
    fused = towers.fused(features['question'])
    outputs = {}
    if self.num_answers:
      pooled = fused.pooled
      hidden = nn.Dense(pooled.shape[-1], dtype=pooled.dtype, name='hidden')(pooled)
      hidden = nn.Dropout(self.dropout_rate)(nn.gelu(hidden), deterministic=deterministic)
      # Zero kernel: starts with equal probabilities.
      outputs['cls'] = nn.Dense(self.num_answers, dtype=jnp.float32, name='answers',
                                kernel_init=nn.initializers.zeros)(hidden)
    if self.written and 'answer' in features:
      outputs['gen'] = writing.teacher_forced_logits(towers, fused, features['answer'], self.pad_id)
    return outputs

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the most probable answers (index and probability, [B, 5]) and the written one."""
    arrays = {}
    if self.num_answers:
      question = {'question': features['question']}  # without the target text
      logits = self(towers, question, deterministic=True)['cls']
      arrays['top_probability'], arrays['top_index'] = jax.lax.top_k(
          jax.nn.softmax(logits), min(_TOP, self.num_answers))
    if self.written:
      arrays |= writing.write(towers, towers.fused(features['question']), self.answer_length,
                              pad_id=self.pad_id, eos_id=self.eos_id, beams=self.beams)
    return arrays
