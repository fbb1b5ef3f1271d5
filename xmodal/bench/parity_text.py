"""Small text towers of transformers (PyTorch), with random weights, to compare ours with."""

from collections.abc import Mapping
import dataclasses
import json
import os

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration of a family.

  Attributes:
    family: config.json's model_type.
    description: what is unusual about it.
    kind: name of transformers' model class.
    config: config values besides the family's sizes in `_SIZES`.
    own_head: whether a T5 has an output layer not tied to the embedding.
    published: whether to use the default size of transformers' config, not `_SIZES`.
  """

  family: str
  description: str
  kind: str
  config: Mapping = dataclasses.field(default_factory=dict)
  own_head: bool = False
  published: bool = False

  @property
  def decodes(self) -> bool:
    """Whether `run` returns logits; otherwise hidden states."""
    return self.kind.endswith('ForConditionalGeneration')

  def make(self):
    """The torch model in eval mode, with every parameter random, norms and biases too."""
    import torch
    import transformers
    config_class = {'t5': 'T5Config', 'mt5': 'MT5Config', 'bert': 'BertConfig',
                    'gpt2': 'GPT2Config'}[self.family]
    sizes = {} if self.published else _SIZES[self.family]
    config = getattr(transformers, config_class)(**{**sizes, **self.config})
    torch.manual_seed(0)
    model = getattr(transformers, self.kind)(config).eval()
    # With 0.02, a published mT5 (sums over a thousand values) is so ill-conditioned that
    # PyTorch's own float32 differs by 4e-5 from its float64.
    scale = 0.01 if self.published else 0.1
    with torch.no_grad():
      for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape)
    if self.own_head:
      model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) / 4)
    return model

  def load(self, folder: str):
    """Reads the torch model from a folder, with the class that its config names."""
    import transformers
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
      kind = json.load(f)['architectures'][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()

  def run(self, model, tokens, mask) -> np.ndarray:
    """Runs transformers on tokens int [B, L] and mask bool [B, L].

    Returns float32 hidden states [B, L, D]; for a T5 with a decoder, logits [B, L, V] with the
    same tokens as decoder inputs.
    """
    import torch
    tokens, mask = torch.tensor(tokens), torch.tensor(mask)
    with torch.no_grad():
      if self.decodes:
        output = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens,
                       decoder_attention_mask=torch.ones_like(tokens)).logits
      else:
        output = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return output.float().numpy()

  def run_ours(self, module, variables, tokens, mask) -> np.ndarray:
    """Runs our module on the same inputs, in float32."""
    inputs = (tokens, mask, tokens) if self.decodes else (tokens, mask)
    method = '__call__' if self.decodes else 'encode'
    run = jax.jit(lambda variables, inputs: module.apply(variables, *inputs, method=method))
    return np.asarray(run(variables, inputs), np.float32)


_T5 = dict(vocab_size=37, d_model=20, d_kv=6, d_ff=28, num_layers=3, num_decoder_layers=2,
           num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=12,
           decoder_start_token_id=0)
_SIZES = {
    't5': _T5,
    'mt5': _T5,
    'bert': dict(vocab_size=41, hidden_size=24, intermediate_size=37, num_hidden_layers=3,
                 num_attention_heads=3, max_position_embeddings=23),
    'gpt2': dict(vocab_size=43, n_embd=20, n_layer=3, n_head=5, n_positions=23,
                 bos_token_id=1, eos_token_id=1),
}

_SEQ2SEQ = 'T5ForConditionalGeneration'
CASES = (
    Case('t5', '1.0: ReLU, tied and scaled output', _SEQ2SEQ),
    Case('t5', '1.1 and Flan: gated GELU, own output', _SEQ2SEQ,
         dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False), own_head=True),
    Case('t5', 'own output, scaled; 7 heads of 2, eps 1e-3', _SEQ2SEQ,
         dict(num_heads=7, d_kv=2, layer_norm_epsilon=1e-3), own_head=True),
    Case('t5', 'tied output, not scaled; 1 head of 20', _SEQ2SEQ,
         dict(num_heads=1, d_kv=20, feed_forward_proj='gated-gelu', tie_word_embeddings=False)),
    Case('t5', 'encoder alone, 5 heads, 32 buckets', 'T5EncoderModel',
         dict(num_heads=5, relative_attention_num_buckets=32)),
    Case('mt5', 'own output', 'MT5ForConditionalGeneration', own_head=True),
    Case('mt5', 'tied output, 5 decoder layers, 7 heads', 'MT5ForConditionalGeneration',
         dict(num_decoder_layers=5, num_heads=7)),
    Case('bert', 'as published, 3 heads', 'BertModel'),
    Case('bert', '7 heads of 3, eps 1e-3, tanh GELU, 1 type', 'BertModel',
         dict(hidden_size=21, num_attention_heads=7, layer_norm_eps=1e-3, hidden_act='gelu_new',
              type_vocab_size=1)),
    Case('bert', '1 head, ReLU, 5 types, with the heads of pretraining', 'BertForPreTraining',
         dict(num_attention_heads=1, hidden_act='relu', type_vocab_size=5)),
    Case('gpt2', 'as published, 5 heads', 'GPT2Model'),
    Case('gpt2', '3 heads of 7, n_inner 33, eps 1e-3, exact GELU', 'GPT2Model',
         dict(n_embd=21, n_head=3, n_inner=33, layer_norm_epsilon=1e-3,
              activation_function='gelu')),
    Case('gpt2', 'logits scaled by layer, with the output layer', 'GPT2LMHeadModel',
         dict(scale_attn_by_inverse_layer_idx=True)),
    Case('gpt2', 'logits not scaled by the width, 1 head, ReLU', 'GPT2Model',
         dict(scale_attn_weights=False, n_head=1, activation_function='relu')),
)
PUBLISHED = (
    Case('t5', 'small', _SEQ2SEQ, dict(decoder_start_token_id=0), published=True),
    Case('mt5', 'small', 'MT5ForConditionalGeneration', dict(decoder_start_token_id=0),
         own_head=True, published=True),
    Case('bert', 'base', 'BertModel', published=True),
    Case('gpt2', 'small', 'GPT2Model', published=True),
)
