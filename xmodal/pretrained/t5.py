"""T5 checkpoints (1.0 and 1.1): config.json and safetensors to the Flax module and parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from xmodal.models.t5 import T5
from xmodal.pretrained.tensors import Entry, init_shapes, require, variables_from_tensors

# Copies of `shared` in files of other years, and a bias that no model reads.
COPIES = (r'encoder\.embed_tokens\.weight|decoder\.embed_tokens\.weight|'
          r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight')


def module_from_config(config: Mapping, tensors: Mapping[str, np.ndarray]) -> T5:
  """The T5 that a checkpoint's config.json describes; raises UserError if none does.

  The tensors say whether the output layer is the embedding: they hold an
  `lm_head.weight` of its own or not, while `tie_word_embeddings` has meant
  different things in different years. Of the two, only the scale of the
  outputs is read from the config.
  """
  require(config, 'model_type', ('t5',))
  require(config, 'feed_forward_proj', ('relu', 'gated-gelu'))
  head = tensors.get('lm_head.weight')
  return T5(
      vocab_size=config['vocab_size'], hidden_dim=config['d_model'], head_dim=config['d_kv'],
      num_heads=config['num_heads'], mlp_dim=config['d_ff'], num_layers=config['num_layers'],
      num_decoder_layers=config.get('num_decoder_layers') or config['num_layers'],
      relative_attention_num_buckets=config['relative_attention_num_buckets'],
      relative_attention_max_distance=config.get('relative_attention_max_distance', 128),
      gated=config.get('feed_forward_proj', 'relu') == 'gated-gelu',
      tie_word_embeddings=head is None or np.array_equal(head, tensors['shared.weight']),
      scale_decoder_outputs=config.get(
          'scale_decoder_outputs', config.get('tie_word_embeddings', True)),
      layer_norm_epsilon=config['layer_norm_epsilon'], dropout_rate=config['dropout_rate'])


def to_flax(tensors: Mapping[str, np.ndarray], module: T5, *, decoder: bool) -> dict:
  """Parameters of module ({'params': ...}) from the tensors of a safetensors file.

  Args:
    tensors: all tensors of the checkpoint.
    module: from module_from_config.
    decoder: with the decoder and output layer, or the encoder alone.

  Raises:
    UserError: a tensor is missing, has the wrong shape, or is not of a T5.
  """
  tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  ignore = COPIES
  if decoder:
    shapes = init_shapes(module, tokens, mask, tokens)
    ignore += r'|lm_head\.weight' if module.tie_word_embeddings else ''
  else:
    shapes = init_shapes(module, tokens, mask, method='encode')
    ignore += r'|decoder\..*|lm_head\.weight'
  entries = [Entry('params/token_embedding/embedding', 'shared.weight')]
  entries += _stack('encoder', {'attention': 'SelfAttention'}, module.gated)
  if decoder:
    entries += _stack('decoder', {'attention': 'SelfAttention',
                                  'cross_attention': 'EncDecAttention'}, module.gated)
    if not module.tie_word_embeddings:
      entries.append(Entry('params/lm_head/kernel', 'lm_head.weight', 'linear'))
  return variables_from_tensors(tensors, entries, shapes, prefix='', ignore=ignore)


def _stack(stack, attentions, gated):
  """The entries of the encoder or decoder; attentions: our names to the file's, in order."""
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
