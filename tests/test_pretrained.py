"""Published checkpoints: read, fine-tuned and exported; errors for broken ones."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tiny
import torch
import transformers

from xmodal import export, pretrained
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.predictor import Predictor
from xmodal.pretrained import __main__ as command
from xmodal.pretrained.positions import cubic_weights
from xmodal.train.plan import Plan

WORDS = 'what where which color shape is the red blue green circle square of there how many yes no'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """{'vision', 'text'}: a ViT for 32 pixels, and a T5 with a tokenizer."""
  root = tmp_path_factory.mktemp('hub')
  torch.manual_seed(0)
  transformers.ViTModel(transformers.ViTConfig(
      hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
      image_size=32, patch_size=8)).save_pretrained(root / 'vision')
  (root / 'vision/preprocessor_config.json').write_text(json.dumps(
      {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.3, 0.1],
       'size': {'height': 32, 'width': 32}}))
  transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=300, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2,
      decoder_start_token_id=0)).save_pretrained(root / 'text')
  train_tokenizer([WORDS], 250).save(root / 'text')
  return {'vision': root / 'vision', 'text': root / 'text'}


@pytest.fixture(scope='module')
def trained(folders, tmp_path_factory):
  """A workdir of a few steps, initialised from both."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  tiny.train(workdir, changed(folders))
  return workdir


def changed(folders, **values):
  c = tiny.changed(data__image_size=None, **values)
  for part, folder in folders.items():
    c.model[part].pretrained = str(folder)
    for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers'):
      c.model[part][key] = None
  c.model.text.head_dim = None
  return c


# A run initialised from towers


def test_a_run_takes_sizes_pixels_and_tokenizer_from_the_files(folders):
  run = Plan(changed(folders), 'unused')
  assert run.config.data.image_size == 32
  np.testing.assert_allclose(run.model.backbone.image_mean, (0.4, 0.5, 0.6))
  assert run.tokenizer.encode(['red circle'], 4)[0].tolist() == (
      transformers.AutoTokenizer.from_pretrained(folders['text'])('red circle').input_ids + [0])
  said = '\n'.join(run.notes)
  assert '38 tensors loaded' in said and 'pooler.dense.bias' in said
  assert 'newly initialised: backbone/cross_modal' in said
  assert 'text_tower' not in said.split('newly')[1]


def test_a_run_begins_with_the_weights_and_its_folder_needs_no_other(folders, trained, tmp_path):
  run = Plan(changed(folders), str(tmp_path))
  state = run.loader.fill(jax.jit(run.init)())
  file = load_file(folders['vision'] / 'model.safetensors')
  np.testing.assert_array_equal(state.params['backbone']['vision_tower']['final_norm']['scale'],
                                file['layernorm.weight'])
  predictor = Predictor(str(trained))  # a tower's folder is not read again
  assert predictor.towers['vision'].family == 'vit'
  module, variables, preprocessing = predictor.tower('vision')
  assert preprocessing.mean == (0.4, 0.5, 0.6) and module.image_size == (32, 32)
  assert not np.array_equal(variables['params']['final_norm']['scale'], file['layernorm.weight'])


def test_a_run_goes_on_without_the_files(folders, trained, tmp_path, capsys):
  workdir = shutil.copytree(trained, tmp_path / 'run')
  gone = {part: tmp_path / 'gone' / part for part in folders}
  config = changed(folders, train__steps=8)
  assert tiny.train(workdir, config)['resumed_from'] == 6
  # It also reports that the decayed learning rate rises again.
  told = capsys.readouterr().out
  assert 'where it was 1e-05 at step 6: config.train.steps was 6 and is 8' in told
  with pytest.raises(UserError, match='another config'):
    tiny.train(workdir, changed(gone, train__steps=8))


def test_sizes_in_the_config_that_a_checkpoint_overrules_are_reported(folders):
  config = changed(folders)
  config.model.vision.patch_size = 4
  assert any('patch_size not used' in note for note in Plan(config, 'unused').notes)


def test_what_the_config_and_a_checkpoint_say_otherwise_is_reported(folders):
  config = changed(folders, model__vision__name='resnet', model__text__num_decoder_layers=2)
  said = '\n'.join(Plan(config, 'unused').notes)
  assert 'config.model.vision.name=resnet not used: the tower is the pretrained vit' in said
  assert 'config.model.text: num_decoder_layers not used' in said
  # T5's config has 0.1, from pretraining; the run's own rate is used.
  assert 'text tower: dropout_rate is the 0.0 of config.model.dropout_rate, not the 0.1' in said
  assert 'vision tower: dropout_rate' not in said  # both are 0
  with pytest.raises(UserError, match='neighbor_bias=1.0 means nothing to a pretrained'):
    Plan(changed(folders, model__text__neighbor_bias=1.0), 'unused')


def test_a_tower_of_the_other_part_is_refused(folders):
  with pytest.raises(UserError, match=r'config.model.text.pretrained=.* is a vision tower'):
    Plan(changed({'text': folders['vision']}), 'unused')


# Sharded, and exported


_SHARDED = """
import jax, numpy as np, sys
from xmodal import export, pretrained
from xmodal.sharding.mesh import make_mesh
from xmodal.sharding.rules import shard_tree
checkpoint = pretrained.Checkpoint(sys.argv[1])
whole = checkpoint.load()[0]
mesh = make_mesh(1, 4, 2)
shapes = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                      whole, shard_tree(whole, mesh))
sharded = checkpoint.load(shapes=shapes)[0]
jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(sharded))
kernel = sharded['params']['encoder_layers']['mlp']['up']['kernel']
assert kernel.shape == (2, 16, 24) and len(kernel.addressable_shards) == 8
assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 12)}
print('equal')
"""


def test_parameters_are_read_straight_into_a_sharded_layout(folders):
  environment = os.environ | {
      'XLA_FLAGS': os.environ['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=8'}
  done = subprocess.run([sys.executable, '-c', _SHARDED, folders['text']], env=environment,
                        capture_output=True, text=True)
  assert done.stdout == 'equal\n', done.stderr


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('part', ['vision', 'text'])
def test_an_exported_tower_gives_the_same_numbers_in_transformers(trained, tmp_path, part, dtype):
  output = tmp_path / 'out'
  assert export.main(['--checkpoint', str(trained), '--part', part, '--output',
                      str(output), '--dtype', dtype]) == 0
  kind = {'vision': transformers.ViTModel, 'text': transformers.T5ForConditionalGeneration}[part]
  theirs, loading = kind.from_pretrained(output, output_loading_info=True, dtype=torch.float32)
  assert not loading['unexpected_keys'] and not loading['mismatched_keys']
  assert all('pooler' in key for key in loading['missing_keys'])
  module, variables, _ = Predictor(str(trained)).tower(part)
  if dtype == 'bfloat16':  # stored so, computed in float32 by both
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), variables)
  rng = np.random.default_rng(0)
  if part == 'vision':
    inputs = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    ours = module.apply(variables, inputs)
    theirs = theirs(torch.tensor(inputs.transpose(0, 3, 1, 2))).last_hidden_state
    processor = transformers.AutoImageProcessor.from_pretrained(output)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
  else:
    tokens, answer = rng.integers(2, 200, (2, 7)), rng.integers(2, 200, (2, 5))
    mask = np.ones((2, 7))
    ours = module.apply(variables, tokens, mask.astype(bool), answer)
    theirs = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask),
                    decoder_input_ids=torch.tensor(answer)).logits
    assert transformers.AutoTokenizer.from_pretrained(output)('red').input_ids[-1] == 1
  theirs = theirs.detach().numpy()
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_export_writes_over_nothing_and_says_what_has_no_counterpart(
    finished, trained, tmp_path, capsys):
  (tmp_path / 'file').touch()
  arguments = ['--part', 'vision', '--checkpoint']
  assert export.main([*arguments, str(trained), '--output', str(tmp_path)]) == 2
  assert 'already exists' in capsys.readouterr().err
  output = tmp_path / 'out'
  assert export.main([*arguments, str(finished), '--output', str(output)]) == 2
  assert "stem 'conv'" in capsys.readouterr().err and not output.exists()


def test_show_says_what_a_checkpoint_holds(folders, capsys):
  assert command.main(['show', str(folders['vision'])]) == 0
  said = capsys.readouterr().out
  assert 'a vit, for config.model.vision.pretrained' in said and '38 tensors loaded' in said


def test_positions_of_another_size_equal_torch():
  table = torch.randn(1, 1, 7, 1)
  for size in (5, 7, 12):
    theirs = torch.nn.functional.interpolate(table, (size, 1), mode='bicubic')[0, 0, :, 0]
    ours = cubic_weights(7, size) @ table[0, 0, :, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


# Broken checkpoints: one line each


def fault(folder):
  with pytest.raises(UserError) as error:
    pretrained.Checkpoint(str(folder)).plan()
  assert '\n' not in str(error.value)
  return str(error.value)


def copy(folder, to):
  return shutil.copytree(folder, to / 'copy')


def change_tensors(folder, change):
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


@pytest.mark.parametrize('length', [-5, 20, 0])
def test_a_file_cut_short(folders, tmp_path, length):
  file = copy(folders['vision'], tmp_path) / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:length])
  assert 'cut short' in fault(file.parent)


def test_tensors_that_are_missing_or_too_many_or_of_another_shape(folders, tmp_path):
  folder = copy(folders['vision'], tmp_path)
  change_tensors(folder, lambda tensors: tensors.pop('layernorm.bias'))
  assert 'no tensor layernorm.bias, wanted [16]' in fault(folder)
  change_tensors(folder, lambda tensors: tensors.update(
      {'layernorm.bias': np.zeros(7, np.float32)}))
  assert 'layernorm.bias is [7], wanted [16]' in fault(folder)
  change_tensors(folder, lambda tensors: tensors.update(
      {'layernorm.bias': np.zeros(16, np.float32),
       'encoder.layer.2.output.dense.bias': np.ones(16)}))
  assert '1 tensors have no place in the model: encoder.layer.2.output.dense.bias' in fault(folder)


def test_a_pickle_is_refused(folders, tmp_path):
  folder = copy(folders['vision'], tmp_path)
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  assert 'pytorch_model.bin is a pickle, which can run code' in fault(folder)


def test_a_family_that_is_not_known(folders, tmp_path):
  folder = copy(folders['vision'], tmp_path)
  (folder / 'config.json').write_text('{"model_type": "mamba"}')
  assert "model_type is 'mamba', wanted one of t5, mt5, bert" in fault(folder)
  (folder / 'config.json').write_text('{')
  assert 'config.json: not JSON' in fault(folder)
  (folder / 'config.json').unlink()
  assert 'config.json: cannot be read' in fault(folder)


def test_shards_are_read_and_missing_ones_named(folders, tmp_path):
  folder = tmp_path / 'shards'
  model = transformers.ViTModel.from_pretrained(folders['vision'])
  model.save_pretrained(folder, max_shard_size='4KB')
  shards = sorted(folder.glob('model-*.safetensors'))
  assert len(shards) > 2
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(str(folder))[1],
               pretrained.load(str(folders['vision']))[1])
  (folder / 'aside').mkdir()
  shutil.copy(shards[0], folder / 'aside')
  shutil.copy(shards[1], shards[0])
  assert f'is not in {shards[0].name}' in fault(folder)
  shards[0].unlink()
  assert f'1 of its files are missing, such as {shards[0].name}' in fault(folder)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setenv('HF_HOME', str(tmp_path))
  assert 'hub cannot be reached' in fault('google/flan-t5-base')
  assert 'no such folder' in fault(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  assert 'neither model.safetensors' in fault(tmp_path / 'empty')


@pytest.mark.parametrize('values', [
    {'image_mean': [0.5]}, {'image_mean': 'x', 'image_std': [1, 1, 1]}, {'image_std': [0, 1, 1]}])
def test_preprocessing_that_cannot_be_followed(folders, tmp_path, values):
  folder = copy(folders['vision'], tmp_path)
  (folder / 'preprocessor_config.json').write_text(json.dumps(values))
  assert 'wanted three numbers' in fault(folder) and 'for red, green, blue' in fault(folder)
