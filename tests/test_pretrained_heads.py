"""Checkpoints of a family's other models: a complete tower under any prefix with any heads, or an
error. Results equal those of transformers on the same folder."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
import torch
import transformers

from xmodal.errors import UserError
from xmodal.pretrained import Checkpoint, load

torch.set_num_threads(2)
T5 = dict(vocab_size=37, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1,
          num_heads=2, decoder_start_token_id=0)
BERT = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=23)
GPT2 = dict(vocab_size=43, n_embd=16, n_layer=1, n_head=2, n_positions=23, bos_token_id=1,
            eos_token_id=1, pad_token_id=0)
VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
           image_size=16, patch_size=8, encoder_stride=8)
DINOV2 = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
              patch_size=8)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')
SIGLIP = dict(vision_config=VIT, text_config=dict(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=8))
# transformers' base model for a folder, sizes, and classes that write one.
FAMILIES = {
    'T5EncoderModel': (T5, 'T5ForSequenceClassification T5ForQuestionAnswering '
                       'T5ForTokenClassification T5ForConditionalGeneration T5Model '
                       'T5EncoderModel'),
    'MT5EncoderModel': (T5, 'MT5ForSequenceClassification MT5ForTokenClassification'),
    'BertModel': (BERT, 'BertForMaskedLM BertForPreTraining BertForQuestionAnswering '
                  'BertForSequenceClassification BertForTokenClassification '
                  'BertForMultipleChoice BertForNextSentencePrediction'),
    'GPT2Model': (GPT2, 'GPT2LMHeadModel GPT2DoubleHeadsModel GPT2ForSequenceClassification '
                  'GPT2ForTokenClassification GPT2ForQuestionAnswering'),
    'ViTModel': (VIT, 'ViTForImageClassification ViTForMaskedImageModeling'),
    'DeiTModel': (VIT, 'DeiTForMaskedImageModeling DeiTForImageClassification'),
    'Dinov2Model': (DINOV2, 'Dinov2ForImageClassification Dinov2Backbone'),
    'ResNetModel': (RESNET, 'ResNetForImageClassification ResNetBackbone'),
    'SiglipVisionModel': (SIGLIP, 'SiglipForImageClassification SiglipModel')}


def saved(name, sizes, folder):
  """Saves a randomly initialised model of transformers; returns the folder."""
  torch.manual_seed(0)
  kind = getattr(transformers, name)
  model = kind(kind.config_class(**sizes))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape)
  model.save_pretrained(folder)
  return folder


def theirs(base, folder):
  """Outputs of transformers' base model of a folder, float32."""
  if base == 'SiglipVisionModel':  # without the text tower
    kind = json.loads((folder / 'config.json').read_text())['architectures'][0]
    model = getattr(transformers, kind).from_pretrained(folder).vision_model.eval()
  else:
    model = getattr(transformers, base).from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    if base.startswith(('T5', 'MT5', 'Bert', 'GPT2')):
      return model(input_ids=torch.tensor(TOKENS)).last_hidden_state.numpy()
    output = model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
  return output if output.ndim == 3 else output.transpose(0, 2, 3, 1)


TOKENS = np.random.default_rng(0).integers(2, 20, (2, 7))
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def ours(folder):
  module, variables = load(str(folder))
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  if hasattr(module, 'vocab_size'):
    return np.asarray(module.apply(variables, TOKENS, np.ones_like(TOKENS, bool), method='encode'))
  return np.asarray(module.apply(variables, IMAGES))


def assert_close(a, b):
  assert a.shape == b.shape and np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def rewrite(folder, to, change=lambda tensors: tensors, **config):
  """A copy of a folder, with other tensors or config."""
  to.mkdir()
  stated = json.loads((folder / 'config.json').read_text())
  (to / 'config.json').write_text(json.dumps(stated | config))
  tensors = change(load_file(folder / 'model.safetensors'))
  save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()},
            to / 'model.safetensors', metadata={'format': 'pt'})
  return to


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Towers without heads, by the first word of the class that wrote them."""
  root = tmp_path_factory.mktemp('towers')
  return {name: saved(kind, sizes, root / name) for name, kind, sizes in (
      ('t5', 'T5EncoderModel', T5), ('decoder', 'T5ForConditionalGeneration', T5),
      ('bert', 'BertModel', BERT), ('gpt2', 'GPT2Model', GPT2), ('vit', 'ViTModel', VIT),
      ('dinov2', 'Dinov2Model', DINOV2), ('resnet', 'ResNetModel', RESNET))}


BASES = {'t5': 'T5EncoderModel', 'decoder': 'T5EncoderModel', 'bert': 'BertModel',
         'gpt2': 'GPT2Model', 'vit': 'ViTModel', 'dinov2': 'Dinov2Model', 'resnet': 'ResNetModel'}


def refused(folder, words):
  with pytest.raises(UserError, match=words) as error:
    Checkpoint(str(folder)).load()
  assert '\n' not in str(error.value)


# Heads


@pytest.mark.parametrize('base, sizes, name', [
    (base, sizes, name) for base, (sizes, names) in FAMILIES.items() for name in names.split()])
def test_a_tower_in_the_file_of_another_model(base, sizes, name, tmp_path):
  folder = saved(name, sizes, tmp_path)
  checkpoint = Checkpoint(str(folder))
  report = checkpoint.plan().report
  assert not set(report.loaded) & set(report.ignored)
  assert set(report.loaded) | set(report.ignored) == set(load_file(folder / 'model.safetensors'))
  assert_close(ours(folder), theirs(base, folder))
  heads = {'ForSequence', 'ForToken', 'ForQuestion', 'ForImage', 'ForMultiple', 'ForNext'}
  if any(head in name for head in heads):
    assert any(name.split('.')[0] in str(report) for name in report.ignored)


@pytest.mark.parametrize('prefix', ['', 'module.encoder.', '0.auto_model.'])
@pytest.mark.parametrize('name', BASES)
def test_a_tower_under_any_prefix_with_any_head(folders, prefix, name, tmp_path):
  heads = {head: np.ones((3, 16), np.float32) for head in (
      'linear.weight', 'v_head.summary.weight', 'score.weight', 'a_head_of_mine.0.weight',
      f'{prefix}projection.weight', 'logit_scale')}

  def change(tensors):
    return {prefix + key: value for key, value in tensors.items()} | heads

  folder = rewrite(folders[name], tmp_path / 'other', change)
  jax.tree.map(np.testing.assert_array_equal, load(str(folder))[1], load(str(folders[name]))[1])
  report = Checkpoint(str(folder)).plan().report
  assert heads.keys() <= set(report.ignored)
  assert 'linear.weight' in str(report) or 'linear.*' in str(report)


def test_two_towers_are_not_chosen_between(folders, tmp_path):
  def twice(tensors):
    return {prefix + key: value for key, value in tensors.items() for prefix in ('a.', 'b.')}

  refused(rewrite(folders['bert'], tmp_path / 'twice', twice),
          '2 towers, under the prefixes a., b.')

  def usual(tensors):  # the usual prefix, beside another
    return {f'bert.{key}': value for key, value in tensors.items()} | {
        f'average.{key}': value + 1 for key, value in tensors.items()}

  assert_close(ours(rewrite(folders['bert'], tmp_path / 'usual', usual)),
               theirs('BertModel', folders['bert']))


@pytest.mark.parametrize('name, tensor', [
    ('bert', 'encoder.layer.2.output.dense.bias'),
    ('bert', 'encoder.layer.0.attention.self.query.lora_A.weight'),
    ('bert', 'encoder.layer.0.output.adapters.x.adapter_down.0.weight'),
    ('bert', 'encoder.layer.0.output.dense.weight_scale'),
    ('bert', 'embeddings.extra_embeddings.weight'), ('bert', 'prefix_encoder.embedding.weight'),
    ('gpt2', 'h.1.mlp.c_fc.bias'), ('gpt2', 'h.0.crossattention.c_attn.weight'),
    ('t5', 'encoder.block.1.layer.0.layer_norm.weight'),
    ('t5', 'encoder.block.0.layer.0.SelfAttention.q.weight_scale_inv'),
    ('vit', 'encoder.layer.1.output.dense.bias'), ('vit', 'embeddings.prompt_embeddings'),
    ('dinov2', 'embeddings.register_tokens'),
    ('resnet', 'encoder.stages.1.layers.1.shortcut.convolution.weight')])
@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_what_would_change_a_towers_outputs_is_not_left_out(
    folders, name, tensor, prefix, tmp_path):
  def change(tensors):
    tensors = tensors | {tensor: np.ones(3, np.float32)}
    return {prefix + key: value for key, value in tensors.items()}

  refused(rewrite(folders[name], tmp_path / 'more', change),
          f'1 tensors have no place in the model: {prefix}{tensor}'.replace('.', r'\.'))


@pytest.mark.parametrize('name', BASES)
def test_a_tower_with_a_head_that_lacks_a_tensor(folders, name, tmp_path):
  lost = sorted(load_file(folders[name] / 'model.safetensors'))
  lost = next(key for key in lost if key.startswith('encoder.') or key.startswith('h.0.ln_1'))

  def change(tensors):
    return {f'model.{key}': value for key, value in tensors.items() if key != lost} | {
        'linear.weight': np.ones(3, np.float32)}

  refused(rewrite(folders[name], tmp_path / 'less', change), f'no tensor {lost}')


# Tied tensors under their other names


@pytest.mark.parametrize('name, table, other', [
    ('decoder', 'shared.weight', 'lm_head.weight'),
    ('decoder', 'shared.weight', 'encoder.embed_tokens.weight'),
    ('decoder', 'shared.weight', 'decoder.embed_tokens.weight'),
    ('t5', 'shared.weight', 'encoder.embed_tokens.weight'),
    ('gpt2', 'wte.weight', 'lm_head.weight'),
    ('bert', 'embeddings.word_embeddings.weight', 'cls.predictions.decoder.weight')])
def test_a_table_under_its_other_name(folders, name, table, other, tmp_path):
  prefix = {'gpt2': 'transformer.', 'bert': 'bert.'}.get(name, '')

  def change(tensors):
    tensors = dict(tensors)
    value = tensors.pop(table)
    return {prefix + key: x for key, x in tensors.items()} | {other: value}

  folder = rewrite(folders[name], tmp_path / 'other', change)
  assert_close(ours(folder), theirs(BASES[name], folders[name]))
  assert other in Checkpoint(str(folder)).plan().report.loaded
  kind = {'decoder': 'T5ForConditionalGeneration', 'gpt2': 'GPT2LMHeadModel',
          'bert': 'BertForMaskedLM', 't5': 'T5EncoderModel'}[name]
  model = getattr(transformers, kind).from_pretrained(folder)
  np.testing.assert_array_equal(  # transformers reads it so, too
      load(str(folder))[1]['params']['token_embedding']['embedding'],
      model.get_input_embeddings().weight.detach())
  if other in ('lm_head.weight', 'cls.predictions.decoder.weight'):
    refused(rewrite(folder, tmp_path / 'untied', tie_word_embeddings=False), f'no tensor {table}')


def test_copies_of_a_table_that_differ(folders, tmp_path):
  def change(tensors):
    return tensors | {'encoder.embed_tokens.weight': tensors['shared.weight'] + 1}

  refused(rewrite(folders['decoder'], tmp_path / 'other', change),
          'encoder.embed_tokens.weight and shared.weight differ')


def test_a_t5_that_never_had_an_output_layer_is_an_encoder(tmp_path):
  folder = saved('T5ForQuestionAnswering', T5, tmp_path / 'saved')
  untied = rewrite(folder, tmp_path / 'untied', tie_word_embeddings=False)
  assert Checkpoint(str(folder)).module.num_decoder_layers == 1
  checkpoint = Checkpoint(str(untied))
  assert checkpoint.module.num_decoder_layers == 0
  assert any(name.startswith('decoder.') for name in checkpoint.plan().report.ignored)
  assert_close(ours(untied), theirs('T5EncoderModel', folder))


# Other dtypes


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'float8_e5m2', 'float16', 'float64'])
def test_floats_of_other_widths(folders, dtype, tmp_path):
  def change(model):
    return {key: value.to(getattr(torch, dtype)) for key, value in model.state_dict().items()}

  model = transformers.BertModel.from_pretrained(folders['bert'])
  (tmp_path / 'config.json').write_text((folders['bert'] / 'config.json').read_text())
  tensors = change(model)
  save_torch(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
  wide = {key: value.float() for key, value in tensors.items()}
  model.load_state_dict(wide)
  with torch.no_grad():
    expected = model.eval()(torch.tensor(TOKENS)).last_hidden_state.numpy()
  assert_close(ours(tmp_path), expected)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int64, bool])
def test_whole_numbers_are_no_weights(folders, dtype, tmp_path):
  name = 'encoder.layer.0.output.dense.weight'

  def change(tensors):
    return tensors | {name: (tensors[name] * 100).astype(dtype)}

  refused(rewrite(folders['bert'], tmp_path / 'other', change), f'tensor {name} is .*dequantise')


def test_bfloat16_needs_no_jax_before(folders, tmp_path):
  def change(tensors):
    return {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}

  assert np.isfinite(ours(rewrite(folders['vit'], tmp_path / 'other', change))).all()


# Configs


@pytest.mark.parametrize('name, config', [
    ('bert', {'layer_norm_eps': '1e-12'}), ('bert', {'vocab_size': 41.0}),
    ('bert', {'hidden_size': '16', 'num_hidden_layers': '2'}), ('bert', {'layer_norm_eps': 0}),
    ('vit', {'image_size': '16'}), ('vit', {'image_size': [16.0, '16']}),
    ('gpt2', {'n_inner': 64.0}), ('gpt2', {'n_inner': '64', 'layer_norm_epsilon': '1e-05'}),
    ('resnet', {'depths': [1.0, '1']}), ('dinov2', {'layerscale_value': '1.0', 'mlp_ratio': 4.0}),
    ('t5', {'layer_norm_epsilon': '0.000001', 'd_kv': 4.0})])
def test_numbers_of_near_types_are_read(folders, name, config, tmp_path):
  folder = rewrite(folders[name], tmp_path / 'other', **config)
  module = Checkpoint(str(folder)).module
  if config == {'layer_norm_eps': 0}:
    assert module.layer_norm_eps == 0
  else:
    assert module == Checkpoint(str(folders[name])).module
  assert hash(module) is not None


@pytest.mark.parametrize('name, config', [
    ('bert', {'use_cache': 1}), ('bert', {'id2label': ['a']}), ('bert', {'vocab_size': 41.5}),
    ('bert', {'num_attention_heads': 0}), ('bert', {'num_attention_heads': 3}),
    ('bert', {'hidden_size': -16}), ('bert', {'hidden_size': None}), ('bert', {'hidden_size': []}),
    ('bert', {'vocab_size': 10 ** 30}), ('bert', {'layer_norm_eps': float('nan')}),
    ('bert', {'layer_norm_eps': float('inf')}), ('bert', {'model_type': ['bert']}),
    ('bert', {'hidden_act': ['gelu']}), ('bert', {'dtype': 'nonsense'}),
    ('bert', {'max_position_embeddings': 0}), ('bert', {'hidden_dropout_prob': 2.0}),
    ('vit', {'patch_size': 0}), ('vit', {'image_size': 20}), ('vit', {'image_size': [16]}),
    ('vit', {'image_size': -16}), ('vit', {'encoder_stride': None}), ('vit', {'patch_size': 'x'}),
    ('gpt2', {'n_head': 0}), ('gpt2', {'n_inner': -1}), ('t5', {'num_heads': 0}),
    ('t5', {'relative_attention_num_buckets': 1}), ('t5', {'architectures': 3}),
    ('t5', {'feed_forward_proj': 3}), ('resnet', {'depths': '1'}), ('resnet', {'depths': [1]}),
    ('resnet', {'hidden_sizes': [8, 0]}), ('resnet', {'embedding_size': 0}),
    ('dinov2', {'mlp_ratio': 0}), ('dinov2', {'num_attention_heads': 0})])
def test_a_config_that_means_nothing_ends_in_one_line(folders, name, config, tmp_path):
  refused(rewrite(folders[name], tmp_path / 'other', **config), str(tmp_path / 'other'))
