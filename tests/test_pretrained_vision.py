"""Vision checkpoints against transformers (PyTorch), both ways, through the files themselves."""

import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from xmodal.bench import parity_vision
from xmodal.errors import UserError
from xmodal.models.towers.resnet import ResNet
from xmodal.models.towers.vgg import VGG
from xmodal.models.towers.vit import ViT
from xmodal.pretrained import Checkpoint, vgg
from xmodal.pretrained.export import save
from xmodal.pretrained.families import family_of_module
from xmodal.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from xmodal.pretrained.tensors import init_shapes
from xmodal.sharding.rules import path_name, spec_for

torch.set_num_threads(2)
EACH = pytest.mark.parametrize(
    'case', parity_vision.CASES, ids=lambda case: f'{case.family}: {case.description}')
FIRST = {case.family: case for case in reversed(parity_vision.CASES)}
FIRST_OF_EACH = pytest.mark.parametrize('case', FIRST.values(), ids=FIRST)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """case -> (torch model, its saved folder); each made once."""
  made = {}

  def save(case):
    if id(case) not in made:
      model, folder = case.make(), tmp_path_factory.mktemp('saved')
      model.save_pretrained(folder)
      made[id(case)] = model, folder
    return made[id(case)]

  return save


def assert_close(ours, theirs, tolerance=1e-5):
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def run(module, variables, images):
  return np.asarray(jax.jit(module.apply)(variables, images), np.float32)


def read_back(folder):
  """The torch model of an exported folder, of which only heads may be missing."""
  model, troubles = parity_vision.load(folder)
  assert all(name.startswith(('pooler.', 'classifier.')) for name in troubles)
  return model


@EACH
def test_outputs_equal_those_of_torch(saved, case):
  model, folder = saved(case)
  checkpoint = Checkpoint(folder)
  module = checkpoint.module.clone(**case.fields)
  variables, report = checkpoint.load(module)
  assert bool(report.fitted) == ('image_size' in case.fields and 'as many' not in case.description)
  images = case.images()
  ours = run(module, variables, images)
  assert_close(ours, case.run(model, images))
  # In 16 bits, the loudest channel of each picture is the same, or as loud within 2%: torch rounds
  # more.
  pooled, rounded = (x.reshape(len(x), -1, x.shape[-1]).mean(1) for x in (
      ours, run(module.clone(dtype=jax.numpy.bfloat16), variables, images)))
  assert (pooled != rounded).any()
  chosen = np.take_along_axis(pooled, rounded.argmax(-1)[:, None], axis=-1)[:, 0]
  assert (chosen >= 0.98 * pooled.max(-1)).all()


@pytest.mark.parametrize('case', [case for case in parity_vision.CASES if not case.fields],
                         ids=lambda case: f'{case.family}: {case.description}')
def test_what_we_write_is_read_by_torch_and_by_us(saved, tmp_path, case):
  model, folder = saved(case)
  checkpoint = Checkpoint(folder)
  variables, _ = checkpoint.load()
  save(tmp_path / 'ours', checkpoint.module, variables)
  theirs = read_back(tmp_path / 'ours')
  images = case.images()
  assert_close(parity_vision.run(theirs, images), case.run(model, images))
  again = Checkpoint(tmp_path / 'ours')
  assert again.module == checkpoint.module
  jax.tree.map(np.testing.assert_array_equal, again.load()[0], variables)


@pytest.mark.parametrize('module', [
    ViT(8, 15, 28, 5, 2, (32, 32), use_cls_token=False),
    ViT(8, 15, 28, 5, 2, (16, 32), gelu='tanh'),
    ViT(8, 15, 28, 5, 2, (16, 32), use_distillation_token=True),
    ViT(8, 16, 48, 2, 1, (32, 32), num_registers=2, layer_scale=1e-5, swiglu=True),
    ResNet('bottleneck', (1, 2), (16, 32), 8)])
def test_what_was_trained_here_is_read_by_transformers(tmp_path, module):
  images = np.random.default_rng(0).normal(size=(2, *getattr(module, 'image_size', (64, 96)), 3))
  images = images.astype(np.float32)
  shapes, tree = jax.tree.flatten(init_shapes(module, images))
  rng = np.random.default_rng(1)
  variables = tree.unflatten([np.abs(rng.normal(size=s.shape) / 3).astype(np.float32)
                              for s in shapes])
  save(tmp_path / 'ours', module, variables)
  theirs = read_back(tmp_path / 'ours')
  assert_close(run(module, variables, images), parity_vision.run(theirs, images))


@pytest.mark.parametrize('module, message', [
    (ViT(8, 16, 32, 2, 1, (32, 32), stem='conv'), "stem 'conv'"),
    (ViT(8, 16, 32, 2, 1, (16, 32), use_cls_token=False), r'\(16, 32\).* SigLIP .* square'),
    (ViT(8, 16, 32, 2, 1, (16, 16), use_cls_token=False, qkv_bias=False), 'qkv_bias'),
    (ViT(8, 16, 32, 2, 1, (16, 32), layer_scale=1.), r'\(16, 32\).* DINOv2 .* square'),
    (ViT(8, 16, 40, 2, 1, (32, 32), layer_scale=1.), 'mlp_dim 40 .* hidden_dim 16'),
    (ViT(8, 16, 32, 2, 1, (32, 32), num_registers=2), 'layer_scale'),
    (ResNet('basic', (1,), (8,), norm='group'), "norm 'group'"),
    (VGG((1, 1, 1, 1, 1)), r'\(1, 1, 1, 1, 1\).* vgg11')])
def test_what_transformers_has_no_place_for_is_not_written(module, message):
  with pytest.raises(UserError, match=message):
    family_of_module(module).config_from_module(module)


# Other files


@pytest.mark.parametrize('family, name, heads', [
    ('vit', 'ViTForImageClassification', 'classifier.'),
    ('deit', 'DeiTForImageClassificationWithTeacher', 'cls_classifier. distillation_classifier.'),
    ('dinov2', 'Dinov2ForImageClassification', 'classifier. dinov2.embeddings.mask_token'),
    ('dinov2_with_registers', 'Dinov2WithRegistersForImageClassification',
     'classifier. dinov2_with_registers.embeddings.mask_token'),
    ('siglip', 'SiglipForImageClassification',
     'classifier. vision_model.head. head. text_model. logit_'),
    ('resnet', 'ResNetForImageClassification', 'classifier. resnet.')])
def test_heads_are_ignored_and_named(tmp_path, family, name, heads):
  model = FIRST[family].make()
  classifier = parity_vision.randomise(getattr(transformers, name)(model.config))
  classifier.save_pretrained(tmp_path)
  _, report = Checkpoint(tmp_path).load()
  assert len(report.loaded) > 10
  assert report.ignored and all(name.startswith(tuple(heads.split())) for name in report.ignored)


def test_siglip_of_years_with_a_prefix(saved, tmp_path):
  case = FIRST['siglip_vision_model']
  model, folder = saved(case)
  tensors = load_file(folder / 'model.safetensors')
  assert 'post_layernorm.weight' in tensors
  save_file({f'vision_model.{name}': value for name, value in tensors.items()},
            tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
  checkpoint = Checkpoint(tmp_path)
  images = case.images()
  assert_close(run(checkpoint.module, checkpoint.load()[0], images), case.run(model, images))


@pytest.mark.parametrize('family', ['vit', 'deit', 'dinov2', 'dinov2_with_registers'])
def test_names_as_transformers_5_has_them_in_memory(saved, tmp_path, family):
  model, folder = saved(FIRST[family])
  model.save_pretrained(tmp_path, save_original_format=False)
  assert set(load_file(tmp_path / 'model.safetensors')) != set(
      load_file(folder / 'model.safetensors'))
  jax.tree.map(np.testing.assert_array_equal, Checkpoint(tmp_path).load()[0],
               Checkpoint(folder).load()[0])


@pytest.mark.parametrize('name', vgg.MODULES)
def test_vgg_is_known_by_its_tensors(name):
  with torch.device('meta'):
    names = parity_vision.vgg_layers(name).state_dict()
  tensors = {f'features.{key}': tensor for key, tensor in names.items()}
  assert vgg.module_from_config({}, tensors) == vgg.MODULES[name]
  assert vgg.config_from_module(vgg.MODULES[name])['architecture'] == name


def test_vgg_of_timm(saved, tmp_path):
  case = FIRST['vgg']
  _, folder = saved(case)
  timm = {name.replace('classifier.', 'pre_logits.fc'): value
          for name, value in load_file(folder / 'model.safetensors').items()}
  save_file(timm | {'head.fc.weight': np.zeros((3, 3), np.float32)}, tmp_path / 'model.safetensors')
  stated = {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6], 'input_size': [3, 64, 96]}
  config = {'architecture': 'vgg11', 'num_classes': 10, 'pretrained_cfg': stated}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  checkpoint = Checkpoint(tmp_path)
  assert checkpoint.preprocessing == ((64, 96), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  jax.tree.map(np.testing.assert_array_equal, checkpoint.load()[0], Checkpoint(folder).load()[0])
  ours = checkpoint.preprocessing._replace(mean=(0.7, 0.8, 0.9))
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(ours.to_config()))
  assert Checkpoint(tmp_path).preprocessing == ours
  (tmp_path / 'config.json').write_text(json.dumps(config | {'architecture': 'vgg16'}))
  with pytest.raises(UserError, match="architecture is 'vgg16', but .* vgg11"):
    Checkpoint(tmp_path)


def test_preprocessing_of_a_file_without_any(saved):
  for family in ('deit', 'dinov2', 'resnet', 'vgg'):
    preprocessing = Checkpoint(saved(FIRST[family])[1]).preprocessing
    assert preprocessing[1:] == (IMAGENET_MEAN, IMAGENET_STD)
  for family, size in (('vit', (24, 32)), ('siglip', (32, 32))):
    preprocessing = Checkpoint(saved(FIRST[family])[1]).preprocessing
    assert preprocessing == (size, (0.5,) * 3, (0.5,) * 3)


# Bad input


def tampered(folder, to, change):
  """A copy of a checkpoint's folder with other tensors."""
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, to / 'model.safetensors')
  if (folder / 'config.json').exists():
    (to / 'config.json').write_text((folder / 'config.json').read_text())
  return Checkpoint(to)


# A required tensor, and a surplus one of a layer, token or bias.
NAMES = {
    'vit': ('encoder.layer.1.output.dense.bias', 'encoder.layer.2.output.dense.bias'),
    'deit': ('embeddings.distillation_token', 'embeddings.second_token'),
    'dinov2': ('encoder.layer.0.layer_scale1.lambda1', 'embeddings.register_tokens'),
    'dinov2_with_registers': ('embeddings.register_tokens', 'encoder.layer.0.mlp.weights_in.bias'),
    'siglip_vision_model': ('post_layernorm.weight', 'embeddings.class_embedding'),
    'siglip': ('vision_model.encoder.layers.0.mlp.fc1.bias',
               'vision_model.encoder.layers.2.mlp.fc1.bias'),
    'resnet': ('encoder.stages.1.layers.0.shortcut.normalization.running_mean',
               'encoder.stages.1.layers.1.shortcut.convolution.weight'),
    'vgg': ('features.3.bias', 'features.1.bias')}


@FIRST_OF_EACH
def test_tensors_that_do_not_fit_are_named(saved, tmp_path, case):
  _, folder = saved(case)
  name, extra = NAMES[case.family]
  own = name.removeprefix('vision_model.').replace('.', r'\.')
  shape = list(load_file(folder / 'model.safetensors')[name].shape)
  wrong = [*shape[:-1], shape[-1] + 1]
  shown = [str(s).replace('[', r'\[').replace(']', r'\]') for s in (wrong, shape)]
  with pytest.raises(UserError, match=rf'no tensor {own}, wanted {shown[1]}'):
    tampered(folder, tmp_path, lambda tensors: tensors.pop(name)).load()
  with pytest.raises(UserError, match=rf'tensor {own} is {shown[0]}, wanted {shown[1]}'):
    tampered(folder, tmp_path, lambda tensors: tensors.update(
        {name: np.zeros(wrong, np.float32)})).load()
  with pytest.raises(UserError, match=extra.replace('.', r'\.') + '; does config.json belong'):
    tampered(folder, tmp_path, lambda tensors: tensors.update(
        {extra: np.zeros(3, np.float32)})).load()


def test_a_position_table_of_another_grid_is_refused(saved, tmp_path):
  for family, name in (('vit', 'embeddings.position_embeddings'),
                       ('siglip_vision_model', 'embeddings.position_embedding.weight')):
    _, folder = saved(FIRST[family])

    def shorten(tensors, name=name):
      tensors[name] = np.ascontiguousarray(tensors[name][..., :-1, :])

    with pytest.raises(UserError, match='position table of .* cannot be made .* for a grid of'):
      tampered(folder, tmp_path, shorten).load()


@pytest.mark.parametrize('family, change, message', [
    ('vit', {'hidden_act': 'relu'}, "hidden_act is 'relu', only 'gelu' or"),
    ('vit', {'patch_size': [8, 4]}, r'patch_size is \(8, 4\), only square'),
    ('siglip_vision_model', {'num_channels': 1}, 'num_channels is 1, only 3'),
    ('dinov2_with_registers', {'num_register_tokens': 0}, 'num_register_tokens is 0'),
    ('resnet', {'hidden_act': 'gelu'}, "hidden_act is 'gelu', only 'relu'")])
def test_configs_that_cannot_be_followed_are_refused(saved, tmp_path, family, change, message):
  _, folder = saved(FIRST[family])
  (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
  config = json.loads((folder / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=message):
    Checkpoint(tmp_path)


# Sharding


@EACH
def test_every_parameter_has_a_rule_and_no_large_one_stays_whole(saved, case):
  module = Checkpoint(saved(case)[1]).module
  mesh = types.SimpleNamespace(shape={'data': 1, 'fsdp': 8, 'tensor': 1})
  shapes = family_of_module(module).variable_shapes(module)
  for path, x in jax.tree_util.tree_leaves_with_path(shapes):
    spec = spec_for(path_name(path), x.shape, mesh)
    assert x.size < 100_000 or 'fsdp' in jax.tree.leaves(tuple(spec)), path_name(path)
