"""GPT-2 checkpoints."""

from collections.abc import Mapping

import jax.numpy as jnp

from xmodal.models.towers.gpt2 import Gpt2
from xmodal.pretrained.activations import read_activation, write_activation
from xmodal.pretrained.tensors import Entry, grow_rows, init_shapes, norm, require

MODULE = Gpt2
PART = 'text'
PREFIXES = ('transformer.',)
RENAMES = ()
NAMESPACE = ('wte', 'wpe', 'h', 'ln_f')
IGNORE = r'h\.\d+\.attn\.(bias|masked_bias)'  # causal masks, stored in older files


def module_from_config(config: Mapping, tensors: Mapping) -> Gpt2:
  """The GPT-2 that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  require(config, 'add_cross_attention', (False,))
  return Gpt2(
      vocab_size=config['vocab_size'], hidden_dim=config['n_embd'],
      mlp_dim=config['n_inner'] or 4 * config['n_embd'], num_heads=config['n_head'],
      num_layers=config['n_layer'], max_positions=config['n_positions'],
      activation=read_activation(config, 'activation_function'),
      scale_attention=config['scale_attn_weights'],
      scale_attention_by_layer=config['scale_attn_by_inverse_layer_idx'],
      layer_norm_eps=config['layer_norm_epsilon'], dropout_rate=config['resid_pdrop'])


def tied(config: Mapping) -> dict:
  """The token embedding may be saved as the output layer."""
  return {'wte.weight': ('lm_head.weight',)} if config['tie_word_embeddings'] else {}


def variable_shapes(module: Gpt2):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


def entries(module: Gpt2, source: Gpt2):
  """The table of tensors."""
  layer = 'h.{}.'
  return [
      Entry('params/token_embedding/embedding', 'wte.weight',
            fit=grow_rows if module.vocab_size > source.vocab_size else None),
      Entry('params/position_embedding', 'wpe.weight'),
      *norm('params/layers/attention_norm', layer + 'ln_1'),
      *_conv1d('params/layers/attention/query', layer + 'attn.c_attn', part=(0, 3)),
      *_conv1d('params/layers/attention/key', layer + 'attn.c_attn', part=(1, 3)),
      *_conv1d('params/layers/attention/value', layer + 'attn.c_attn', part=(2, 3)),
      *_conv1d('params/layers/attention/out', layer + 'attn.c_proj'),
      *norm('params/layers/mlp_norm', layer + 'ln_2'),
      *_conv1d('params/layers/mlp/up', layer + 'mlp.c_fc'),
      *_conv1d('params/layers/mlp/down', layer + 'mlp.c_proj'),
      *norm('params/final_norm', 'ln_f'),
  ]


def _conv1d(path, name, part=(0, 1)):
  """The entries of transformers' Conv1D: a linear layer with weight [in, out]."""
  return [Entry(f'{path}/kernel', f'{name}.weight', 'kernel', part),
          Entry(f'{path}/bias', f'{name}.bias', part=part)]


def config_from_module(module: Gpt2) -> dict:
  """config.json of a checkpoint of this module."""
  return {
      'architectures': ['GPT2Model'], 'model_type': 'gpt2',
      # The tokenizer defines the begin and end tokens.
      'bos_token_id': None, 'eos_token_id': None, 'vocab_size': module.vocab_size,
      'n_embd': module.hidden_dim, 'n_inner': module.mlp_dim, 'n_head': module.num_heads,
      'n_layer': module.num_layers, 'n_positions': module.max_positions,
      'activation_function': write_activation(module.activation),
      'scale_attn_weights': module.scale_attention,
      'scale_attn_by_inverse_layer_idx': module.scale_attention_by_layer,
      'layer_norm_epsilon': module.layer_norm_eps, 'resid_pdrop': module.dropout_rate,
      'embd_pdrop': module.dropout_rate, 'attn_pdrop': module.dropout_rate}
