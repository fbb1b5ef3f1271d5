"""BERT checkpoints."""

from collections.abc import Mapping

import jax.numpy as jnp

from xmodal.models.towers.bert import Bert
from xmodal.pretrained.activations import read_activation, write_activation
from xmodal.pretrained.tensors import Entry, grow_rows, init_shapes, linear, norm, require

MODULE = Bert
PART = 'text'
PREFIXES = ('bert.',)
# TensorFlow's names, in files converted from TensorFlow.
RENAMES = ((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias'))
NAMESPACE = ('embeddings', 'encoder')
IGNORE = r'embeddings\.(position_ids|token_type_ids)'  # constant index buffers


def module_from_config(config: Mapping, tensors: Mapping) -> Bert:
  """The BERT that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  require(config, 'position_embedding_type', ('absolute',))
  require(config, 'is_decoder', (False,))
  return Bert(
      vocab_size=config['vocab_size'], hidden_dim=config['hidden_size'],
      mlp_dim=config['intermediate_size'], num_heads=config['num_attention_heads'],
      num_layers=config['num_hidden_layers'], max_positions=config['max_position_embeddings'],
      num_token_types=config['type_vocab_size'], activation=read_activation(config, 'hidden_act'),
      layer_norm_eps=config['layer_norm_eps'], dropout_rate=config['hidden_dropout_prob'])


def tied(config: Mapping) -> dict:
  """The token embedding may be saved as the output layer of the masked language model."""
  return ({'embeddings.word_embeddings.weight': ('cls.predictions.decoder.weight',)}
          if config['tie_word_embeddings'] else {})


def variable_shapes(module: Bert):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))


def entries(module: Bert, source: Bert):
  """The table of tensors."""
  layer = 'encoder.layer.{}.'
  return [
      Entry('params/token_embedding/embedding', 'embeddings.word_embeddings.weight',
            fit=grow_rows if module.vocab_size > source.vocab_size else None),
      Entry('params/position_embedding', 'embeddings.position_embeddings.weight'),
      Entry('params/type_embedding', 'embeddings.token_type_embeddings.weight'),
      *norm('params/embedding_norm', 'embeddings.LayerNorm'),
      *linear('params/layers/attention/query', layer + 'attention.self.query'),
      *linear('params/layers/attention/key', layer + 'attention.self.key'),
      *linear('params/layers/attention/value', layer + 'attention.self.value'),
      *linear('params/layers/attention/out', layer + 'attention.output.dense'),
      *norm('params/layers/attention_norm', layer + 'attention.output.LayerNorm'),
      *linear('params/layers/mlp/up', layer + 'intermediate.dense'),
      *linear('params/layers/mlp/down', layer + 'output.dense'),
      *norm('params/layers/mlp_norm', layer + 'output.LayerNorm'),
  ]


def config_from_module(module: Bert) -> dict:
  """config.json of a checkpoint of this module."""
  return {
      'architectures': ['BertModel'], 'model_type': 'bert', 'vocab_size': module.vocab_size,
      'hidden_size': module.hidden_dim, 'intermediate_size': module.mlp_dim,
      'num_attention_heads': module.num_heads, 'num_hidden_layers': module.num_layers,
      'max_position_embeddings': module.max_positions, 'type_vocab_size': module.num_token_types,
      'hidden_act': write_activation(module.activation), 'layer_norm_eps': module.layer_norm_eps,
      'hidden_dropout_prob': module.dropout_rate,
      'attention_probs_dropout_prob': module.dropout_rate}
