"""T5 checkpoints: 1.0, 1.1 and Flan, and mT5."""

from collections.abc import Mapping
import re

import jax.numpy as jnp
import numpy as np

from xmodal.errors import UserError
from xmodal.models.towers.t5 import T5
from xmodal.pretrained.tensors import Entry, grow_rows, init_shapes, require

MODULE = T5
PART = 'text'
PREFIXES = ('transformer.',)
RENAMES = ()
NAMESPACE = ('shared', 'encoder', 'decoder')
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Copies of `shared` in files of other versions, and a bias that no model uses.
IGNORE = '|'.join(map(re.escape, (
    *_COPIES, 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight')))


def tied(config: Mapping) -> dict:
  """The embedding may be saved as that of a stack, or as the output layer."""
  return {'shared.weight': (*_COPIES, *(('lm_head.weight',) if config['tie_word_embeddings']
                                        else ()))}


def module_from_config(config: Mapping, tensors: Mapping) -> T5:
  """The T5 that a checkpoint's config.json describes; UserError if it is not supported.

  The output layer is tied to the embedding unless the tensors hold a different
  `lm_head.weight`; the meaning of `tie_word_embeddings` has changed between versions.
  """
  require(config, 'feed_forward_proj', ('relu', 'gated-gelu'))
  shared = tensors.get('shared.weight')
  for name in _COPIES:
    if name in tensors and shared is not None and not np.array_equal(tensors[name], shared):
      raise UserError(f'tensors {name} and shared.weight differ, wanted one table for both; '
                      'choose another checkpoint')
  decodes = _decodes(config, tensors)
  if 'lm_head.weight' in tensors:
    tied_output = np.array_equal(tensors['lm_head.weight'], shared)
  else:
    # transformers 5 always writes True, so False means an older file without its output layer.
    tied_output = config['tie_word_embeddings'] or not decodes
  return T5(
      vocab_size=config['vocab_size'], hidden_dim=config['d_model'], head_dim=config['d_kv'],
      num_heads=config['num_heads'], mlp_dim=config['d_ff'], num_layers=config['num_layers'],
      num_decoder_layers=config['num_decoder_layers'] if decodes else 0,
      relative_attention_num_buckets=config['relative_attention_num_buckets'],
      relative_attention_max_distance=config['relative_attention_max_distance'],
      gated=config['feed_forward_proj'] == 'gated-gelu', tie_word_embeddings=tied_output,
      scale_decoder_outputs=config['model_type'] == 't5' and config['scale_decoder_outputs'],
      layer_norm_epsilon=config['layer_norm_epsilon'], dropout_rate=config['dropout_rate'])


def _decodes(config, tensors):
  """Whether a T5 has a usable decoder, which needs an output layer."""
  kinds = config['architectures'] or ()
  if any(name.endswith(('EncoderModel', 'ForTokenClassification')) for name in kinds):
    return False
  if any(name.endswith('ForConditionalGeneration') for name in kinds):
    return True
  writes = config['tie_word_embeddings'] or 'lm_head.weight' in tensors
  return writes and any(name.startswith('decoder.') for name in tensors)


def variable_shapes(module: T5):
  """Shapes of all variables; without decoder layers, no decoder and no output layer."""
  tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  if not module.num_decoder_layers:
    return init_shapes(module, tokens, mask, method='encode')
  return init_shapes(module, tokens, mask, tokens)


def entries(module: T5, source: T5):
  """The table of tensors."""
  grows = module.vocab_size > source.vocab_size
  yield Entry('params/token_embedding/embedding', 'shared.weight', fit=grow_rows if grows else None)
  yield from _stack('encoder', {'attention': 'SelfAttention'}, module.gated)
  yield from _stack('decoder', {'attention': 'SelfAttention',
                                'cross_attention': 'EncDecAttention'}, module.gated)
  if not module.tie_word_embeddings:
    yield Entry('params/lm_head/kernel', 'lm_head.weight', 'linear',
                fit=_grow_columns if grows else None)


def _grow_columns(kernel, shape):
  return grow_rows(kernel.T, shape[::-1]).T


def _stack(stack, attentions, gated):
  """The entries of the encoder or decoder; attentions: our names -> the file's, in order."""
  ours, block = f'params/{stack}_layers', f'{stack}.block.{{}}.layer'
  for i, (path, name) in enumerate(attentions.items()):
    yield Entry(f'{ours}/{path}_norm/scale', f'{block}.{i}.layer_norm.weight')
    for part in ('query', 'key', 'value', 'out'):
      yield Entry(f'{ours}/{path}/{part}/kernel', f'{block}.{i}.{name}.{part[0]}.weight', 'linear')
  i = len(attentions)
  yield Entry(f'{ours}/mlp_norm/scale', f'{block}.{i}.layer_norm.weight')
  mlp = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if gated else {'up': 'wi', 'down': 'wo'}
  for path, name in mlp.items():
    yield Entry(f'{ours}/mlp/{path}/kernel', f'{block}.{i}.DenseReluDense.{name}.weight', 'linear')
  yield Entry(f'params/{stack}_relative_bias/embedding',
              f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight')
  yield Entry(f'params/{stack}_norm/scale', f'{stack}.final_layer_norm.weight')


def trimmed(module: T5, variables) -> T5:
  """The module without decoder layers if the variables have none (no task generated text)."""
  return module if 'decoder_layers' in variables['params'] else module.clone(num_decoder_layers=0)


def config_from_module(module: T5) -> dict:
  """config.json for this module; mT5 becomes T5 1.1, which differs only in the vocabulary."""
  kind = 'T5ForConditionalGeneration' if module.num_decoder_layers else 'T5EncoderModel'
  return {
      'architectures': [kind], 'model_type': 't5',
      'vocab_size': module.vocab_size, 'd_model': module.hidden_dim, 'd_kv': module.head_dim,
      'num_heads': module.num_heads, 'd_ff': module.mlp_dim, 'num_layers': module.num_layers,
      'num_decoder_layers': module.num_decoder_layers,
      'relative_attention_num_buckets': module.relative_attention_num_buckets,
      'relative_attention_max_distance': module.relative_attention_max_distance,
      'feed_forward_proj': 'gated-gelu' if module.gated else 'relu', 'is_encoder_decoder': True,
      'tie_word_embeddings': module.tie_word_embeddings,
      'scale_decoder_outputs': module.scale_decoder_outputs,
      'layer_norm_epsilon': module.layer_norm_epsilon, 'dropout_rate': module.dropout_rate,
      'decoder_start_token_id': 0, 'pad_token_id': 0, 'eos_token_id': 1}
