"""DETR checkpoints with a ResNet backbone, with the tensor names of transformers or of timm."""

from collections.abc import Mapping
import dataclasses
import re

import jax.numpy as jnp

from xmodal.models.detector.detr import Detr
from xmodal.models.towers.detr_encoder import DetrEncoder
from xmodal.models.towers.resnet import ResNet
from xmodal.pretrained import resnet
from xmodal.pretrained.activations import read_activation, write_activation
from xmodal.pretrained.tensors import Entry, init_shapes, linear, norm, require

MODULE = Detr
PART = 'detector'
AS_PART = {'vision': 'detr_encoder'}  # the family of its backbone and encoder
PREFIXES = ('detr.',)  # in models with a segmentation head
_BACKBONE = 'model.backbone.conv_encoder.model.'


def _from_timm(match):
  """'layer2.0.conv1' is transformers' 'encoder.stages.1.layers.0.layer.0.convolution'."""
  stage, block, kind, number = match.groups()
  part = 'shortcut' if kind == 'downsample.' else f'layer.{int(number) - 1}'
  place = f'encoder.stages.{int(stage) - 1}.layers.{block}.{part}' if stage else 'embedder.embedder'
  is_convolution = kind == 'conv' or kind + number == 'downsample.0'
  return f'{place}.{"convolution" if is_convolution else "normalization"}.'


RENAMES = (
    # transformers 5: names in memory -> names in files.
    (r'^model\.backbone\.model\.', _BACKBONE), (r'\.o_proj\.', '.out_proj.'),
    (r'\.mlp\.fc', '.fc'),
    # timm's names, as in most published checkpoints.
    (rf'(?<={re.escape(_BACKBONE)})(?:layer(\d)\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.',
     _from_timm))
NAMESPACE = ('model', 'class_labels_classifier', 'bbox_predictor')
IGNORE = r'.*\.num_batches_tracked'
_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
TIMM = {'resnet18': ResNet('basic', (2, 2, 2, 2), _BASIC),
        'resnet34': ResNet('basic', (3, 4, 6, 3), _BASIC),
        'resnet50': ResNet('bottleneck', (3, 4, 6, 3), _BOTTLENECK),
        'resnet101': ResNet('bottleneck', (3, 4, 23, 3), _BOTTLENECK),
        'resnet152': ResNet('bottleneck', (3, 8, 36, 3), _BOTTLENECK)}


def module_from_config(config: Mapping, tensors: Mapping) -> Detr:
  """The Detr that a checkpoint's config.json describes; UserError if it is not supported."""
  del tensors
  require(config, 'position_embedding_type', ('sine',))
  # With it, transformers' decoder also has a norm between its layers, unlike the paper's.
  require(config, 'auxiliary_loss', (False,))
  names = {int(key): name for key, name in config['id2label'].items()}
  return Detr(
      backbone=_backbone_from_config(config['backbone_config']),
      class_names=tuple(names.get(i, f'LABEL_{i}') for i in range(len(names))),
      hidden_dim=config['d_model'], num_queries=config['num_queries'],
      num_layers=config['encoder_layers'], num_heads=config['encoder_attention_heads'],
      mlp_dim=config['encoder_ffn_dim'], num_decoder_layers=config['decoder_layers'],
      num_decoder_heads=config['decoder_attention_heads'],
      decoder_mlp_dim=config['decoder_ffn_dim'],
      activation=read_activation(config, 'activation_function'), dropout_rate=config['dropout'])


def _backbone_from_config(config):
  require(config, 'model_type', ('resnet', 'timm_backbone'))
  if config['model_type'] == 'resnet':
    # The last one is the encoder's input.
    require({'out_features': config['out_features'][-1]}, 'out_features',
            (f'stage{len(config["depths"])}',))
    return resnet.module_from_config(config, {})
  name = config['backbone'].split('.')[0]  # without the suffix for its training recipe
  require({'backbone': name}, 'backbone', tuple(TIMM))
  require(config, 'output_stride', (None, 32, 16))
  return TIMM[name].clone(dilate_last_stage=config.get('output_stride') == 16)


def variable_shapes(module: Detr):
  """Shapes of all variables."""
  return init_shapes(module, jnp.zeros((1, 64, 64, 3)))


def entries(module: Detr, source: Detr):
  """The table of tensors."""
  yield from encoder_entries(module, source)
  yield Entry('params/query_position_embedding', 'model.query_position_embeddings.weight')
  yield from _stack('decoder', {'attention': 'self_attn', 'cross_attention': 'encoder_attn'})
  yield from norm('params/decoder_norm', 'model.decoder.layernorm')
  yield from linear('params/class_head', 'class_labels_classifier')
  for i, path in enumerate(('box_hidden1', 'box_hidden2', 'box_out')):
    yield from linear(f'params/{path}', f'bbox_predictor.layers.{i}')


def encoder_entries(module: Detr | DetrEncoder, source: Detr | DetrEncoder):
  """The table of the backbone's and the encoder's tensors."""
  for entry in resnet.entries(module.backbone, source.backbone):
    collection, path = entry.path.split('/', 1)
    yield dataclasses.replace(entry, path=f'{collection}/resnet/{path}',
                              name=_BACKBONE + entry.name)
  yield Entry('params/input_projection/kernel', 'model.input_projection.weight', 'pointwise')
  yield Entry('params/input_projection/bias', 'model.input_projection.bias')
  yield from _stack('encoder', {'attention': 'self_attn'})


def _stack(stack, attentions):
  """The entries of the encoder or decoder; attentions: our names -> the file's."""
  ours, theirs = f'params/{stack}_layers', f'model.{stack}.layers.{{}}'
  for path, name in attentions.items():
    for part in ('query', 'key', 'value', 'out'):
      projection = 'out_proj' if part == 'out' else f'{part[0]}_proj'
      yield from linear(f'{ours}/{path}/{part}', f'{theirs}.{name}.{projection}')
    yield from norm(f'{ours}/{path}_norm', f'{theirs}.{name}_layer_norm')
  yield from linear(f'{ours}/mlp/up', f'{theirs}.fc1')
  yield from linear(f'{ours}/mlp/down', f'{theirs}.fc2')
  yield from norm(f'{ours}/mlp_norm', f'{theirs}.final_layer_norm')


def config_from_module(module: Detr) -> dict:
  """config.json for this module; UserError if transformers has no such DETR."""
  backbone = {**resnet.config_from_module(module.backbone),
              'out_features': [f'stage{len(module.backbone.stage_sizes)}']}
  return {
      'architectures': ['DetrForObjectDetection'], 'model_type': 'detr',
      'use_timm_backbone': False, 'backbone_config': backbone, 'num_channels': 3,
      'd_model': module.hidden_dim, 'num_queries': module.num_queries,
      'encoder_layers': module.num_layers, 'encoder_attention_heads': module.num_heads,
      'encoder_ffn_dim': module.mlp_dim, 'decoder_layers': module.num_decoder_layers,
      'decoder_attention_heads': module.num_decoder_heads,
      'decoder_ffn_dim': module.decoder_mlp_dim,
      'activation_function': write_activation(module.activation), 'dropout': module.dropout_rate,
      'position_embedding_type': 'sine',
      'id2label': {str(i): name for i, name in enumerate(module.class_names)},
      'label2id': {name: i for i, name in enumerate(module.class_names)}}
