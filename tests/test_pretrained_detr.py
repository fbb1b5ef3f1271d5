"""DETR checkpoints against transformers (PyTorch), both ways, through the files themselves."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tiny
import torch
from torch import nn
import transformers
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

from xmodal.bench import parity_detection
from xmodal.bench.parity_vision import randomise
from xmodal.errors import UserError
from xmodal.models.detector.detr import Detr
from xmodal.models.towers.resnet import ResNet
from xmodal.predictor import Predictor
from xmodal.pretrained import Checkpoint, detr, resnet
from xmodal.pretrained import __main__ as command
from xmodal.pretrained.detections import detections, pad_pictures
from xmodal.pretrained.export import save
from xmodal.pretrained.families import family_of_module
from xmodal.pretrained.tensors import init_shapes, match_variables
from xmodal.sharding.rules import path_name, spec_for
from xmodal.train.optimizer.rates import rates
from xmodal.train.plan import Plan

torch.set_num_threads(2)
CASES = parity_detection.CASES
PADDED = CASES[2]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """case -> (torch model, its saved folder); each made once."""
  made = {}

  def save(case):
    if case.description not in made:
      model, folder = case.make(), tmp_path_factory.mktemp('saved')
      model.save_pretrained(folder)
      made[case.description] = model, folder
    return made[case.description]

  return save


def run(module, variables, images, mask=None):
  return jax.device_get(jax.jit(module.apply)(variables, images, mask))


def assert_close(ours, theirs, tolerance=1e-5):
  """Logits and boxes, each relative to its largest value."""
  for a, b in zip(ours, theirs, strict=True):
    assert a.shape == b.shape and a.dtype == np.float32
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


def tampered(folder, to, change, **config):
  """A copy of a checkpoint's folder, with other tensors or config."""
  tensors = load_file(folder / 'model.safetensors')
  tensors = change(tensors) or tensors
  save_file(tensors, to / 'model.safetensors')
  stated = json.loads((folder / 'config.json').read_text()) | config
  (to / 'config.json').write_text(json.dumps(stated))
  return Checkpoint(to)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.description)
def test_logits_and_boxes_equal_those_of_torch_and_again_after_export(saved, tmp_path, case):
  model, folder = saved(case)
  checkpoint = Checkpoint(folder)
  variables, report = checkpoint.load()
  assert not report.ignored
  inputs = case.inputs()
  expected = case.run(model, *inputs)
  assert np.ptp(expected[0], axis=1).max() > 0.1 and np.ptp(expected[1], axis=1).max() > 0.01
  assert_close(run(checkpoint.module, variables, *inputs), expected)

  save(tmp_path / 'ours', checkpoint.module, variables)
  theirs, told = transformers.DetrForObjectDetection.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not (told['missing_keys'] or told['unexpected_keys'] or told['mismatched_keys'])
  assert_close(case.run(theirs.eval(), *inputs), expected)
  assert theirs.config.id2label == model.config.id2label
  again = Checkpoint(tmp_path / 'ours')
  assert again.module == checkpoint.module
  jax.tree.map(np.testing.assert_array_equal, again.load()[0], variables)


def test_in_16_bits_the_results_are_of_32_bits_and_much_the_same(saved):
  checkpoint = Checkpoint(saved(PADDED)[1])
  variables, _ = checkpoint.load()
  exact, rounded = (run(module, variables, *PADDED.inputs()) for module in (
      checkpoint.module, checkpoint.module.clone(dtype=jax.numpy.bfloat16)))
  for a, b in zip(rounded, exact):
    assert a.dtype == np.float32 and (a != b).any()
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99


# Other files


def test_names_as_transformers_5_has_them_in_memory(saved, tmp_path):
  model, folder = saved(PADDED)
  model.save_pretrained(tmp_path, save_original_format=False)
  assert set(load_file(tmp_path / 'model.safetensors')) != set(
      load_file(folder / 'model.safetensors'))
  jax.tree.map(np.testing.assert_array_equal, Checkpoint(tmp_path).load()[0],
               Checkpoint(folder).load()[0])


def test_a_segmentation_head_is_ignored_and_named(tmp_path):
  torch.manual_seed(0)
  model = transformers.DetrForSegmentation(transformers.DetrConfig(
      backbone_config=transformers.ResNetConfig(
          embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type='basic',
          out_features=[f'stage{i}' for i in (1, 2, 3, 4)]),
      d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
      num_queries=3))
  model.save_pretrained(tmp_path)
  variables, report = Checkpoint(tmp_path).load()
  assert report.ignored
  assert all(name.startswith(('mask_head.', 'bbox_attention.')) for name in report.ignored)
  np.testing.assert_array_equal(variables['params']['class_head']['bias'],
                                model.detr.class_labels_classifier.bias.detach())


class Bottleneck(nn.Module):
  """torchvision's ResNet, with the names that timm shares."""

  def __init__(self, channels, planes, stride, dilation):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
    self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
    self.bn2 = nn.BatchNorm2d(planes)
    self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
    self.downsample = None
    if stride > 1 or channels != 4 * planes:
      self.downsample = nn.Sequential(
          nn.Conv2d(channels, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y)).relu()
    return (self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))).relu()


class TimmResNet(nn.Module):
  """timm's resnet50, with its names; dilated: output_stride is 16."""

  def __init__(self, sizes, width, dilated):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    self.pool = nn.MaxPool2d(3, 2, 1)
    channels = width
    for i, blocks in enumerate(sizes):
      planes, dilate, layer = width << i, dilated and i == len(sizes) - 1, []
      for j in range(blocks):
        layer.append(Bottleneck(channels, planes, 2 if i and not j and not dilate else 1,
                                2 if dilate and j else 1))
        channels = 4 * planes
      self.add_module(f'layer{i + 1}', nn.Sequential(*layer))

  def forward(self, images):
    x = self.pool(self.bn1(self.conv1(images)).relu())
    return [self.layer4(self.layer3(self.layer2(self.layer1(x))))]


@pytest.mark.parametrize('name, sizes', [('resnet50', (3, 4, 6, 3)), ('resnet101', (3, 4, 23, 3))])
def test_the_resnets_of_timm_have_these_names_and_shapes(name, sizes):
  with torch.device('meta'):
    tensors = TimmResNet(sizes, 64, False).state_dict()
  shapes = {}
  for timm, tensor in tensors.items():
    own = 'model.backbone.conv_encoder.model.' + timm
    for pattern, replacement in detr.RENAMES:
      own = re.sub(pattern, replacement, own)
    shapes[own.removeprefix('model.backbone.conv_encoder.model.')] = tuple(tensor.shape)
  module = detr.TIMM[name]
  matches = match_variables(shapes, resnet.entries(module, module), resnet.variable_shapes(module))
  assert len(matches) == sum(not key.endswith('.num_batches_tracked') for key in tensors)


PUBLISHED = {  # the backbone keys of facebook/detr-resnet-50
    'backbone': 'resnet50', 'use_timm_backbone': True, 'backbone_config': None,
    'use_pretrained_backbone': True}
SAVED_AGAIN = {  # of a model fine-tuned from it in transformers 4
    **PUBLISHED, 'backbone_kwargs': {'in_chans': 3, 'out_indices': [1, 2, 3, 4]}}


@pytest.mark.parametrize('dilated, stated', [(False, PUBLISHED), (True, SAVED_AGAIN)])
def test_a_backbone_of_timm(tmp_path, monkeypatch, dilated, stated):
  sizes, width = (1, 2, 1, 3), 8
  monkeypatch.setitem(detr.TIMM, 'resnet50', ResNet('bottleneck', sizes, (32, 64, 128, 256), width))
  case = dataclasses.replace(PADDED, backbone=dict(hidden_sizes=[32, 64, 128, 256]))
  model = case.make()
  model.model.backbone.model = randomise(TimmResNet(sizes, width, dilated), 0.1)
  tensors = {
      name.replace('backbone.model.', 'backbone.conv_encoder.model.').replace('.mlp.fc', '.fc')
      .replace('.o_proj.', '.out_proj.'): tensor.contiguous().numpy()
      for name, tensor in model.state_dict().items()}
  assert 'model.backbone.conv_encoder.model.layer1.0.downsample.1.running_mean' in tensors
  save_file(tensors, tmp_path / 'model.safetensors')
  config = {**model.config.to_dict(), **stated, 'dilation': dilated}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  checkpoint = Checkpoint(tmp_path)
  assert checkpoint.module.backbone.dilate_last_stage == dilated
  variables, report = checkpoint.load()
  assert all(name.endswith('.num_batches_tracked') for name in report.ignored)
  assert_close(run(checkpoint.module, variables, *case.inputs()), case.run(model, *case.inputs()))


# Inputs and outputs


PICTURES = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
            for i, size in enumerate(((40, 64), (64, 33), (20, 20)))]


def test_pictures_are_padded_as_transformers_does():
  expected = DetrImageProcessorPil(do_resize=False)(images=PICTURES, return_tensors='np')
  images, mask = pad_pictures(PICTURES)
  np.testing.assert_allclose(images.transpose(0, 3, 1, 2), expected['pixel_values'], atol=1e-6)
  np.testing.assert_array_equal(mask, expected['pixel_mask'])
  larger, seen = pad_pictures(PICTURES, (70, 80))
  assert larger.shape == (3, 70, 80, 3) and seen.sum() == mask.sum()
  np.testing.assert_array_equal(larger[:, :64, :64], images)
  with pytest.raises(UserError, match='picture 1 is 64 x 33 pixels, wanted 63 x 64 or less'):
    pad_pictures(PICTURES, (63, 64))


def test_detections_are_those_of_transformers():
  rng = np.random.default_rng(0)
  logits, boxes = rng.normal(size=(3, 6, 5), scale=3), rng.uniform(size=(3, 6, 4))
  logits[2, :, 4] = 100  # no object
  names, sizes = ('cat', 'dog', 'cow', 'owl'), [p.shape[:2] for p in PICTURES]
  expected = DetrImageProcessorPil().post_process_object_detection(
      types.SimpleNamespace(logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes)),
      threshold=0.4, target_sizes=sizes)
  found = detections(logits, boxes, sizes, names, threshold=0.4)
  assert [len(of_picture) for of_picture in found] == [len(e['scores']) for e in expected]
  assert len(found[0]) > 2 and not found[2]
  for ours, theirs in zip(found, expected):
    order = theirs['scores'].argsort(descending=True)
    assert [o.name for o in ours] == [names[i] for i in theirs['labels'][order]]
    np.testing.assert_allclose([o.score for o in ours], theirs['scores'][order], rtol=1e-5)
    np.testing.assert_allclose(np.reshape([o.box for o in ours], (-1, 4)), theirs['boxes'][order],
                               rtol=1e-4, atol=1e-3)


def test_show_says_what_it_is_for(saved, capsys):
  assert command.main(['show', str(saved(PADDED)[1])]) == 0
  told = capsys.readouterr().out
  assert ': a detr, for xmodal.pretrained.load' in told and 'tensors loaded' in told


# Mistakes


@pytest.mark.parametrize('name', [
    'model.decoder.layers.2.encoder_attn.k_proj.weight', 'bbox_predictor.layers.1.bias',
    'model.query_position_embeddings.weight', 'model.input_projection.weight',
    'model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var'])
def test_a_tensor_that_is_missing_or_misshapen_is_named(saved, tmp_path, name):
  _, folder = saved(PADDED)
  dotted = name.replace('.', r'\.')
  with pytest.raises(UserError, match=rf'no tensor {dotted}, wanted \['):
    tampered(folder, tmp_path, lambda tensors: tensors.pop(name) is None).load()
  with pytest.raises(UserError, match=rf'tensor {dotted} is \[3\], wanted \['):
    tampered(folder, tmp_path, lambda tensors: tensors.update(
        {name: np.zeros(3, np.float32)})).load()


def test_a_layer_too_many_is_named(saved, tmp_path):
  with pytest.raises(UserError, match=r'have no place .*decoder\.layers\.2\..* does config.json'):
    tampered(saved(PADDED)[1], tmp_path, lambda _: None, decoder_layers=2).load()


BACKBONE = {'model_type': 'timm_backbone', 'backbone': 'resnet50', 'out_indices': [1, 2, 3, 4]}


@pytest.mark.parametrize('config, message', [
    ({'position_embedding_type': 'learned'}, "position_embedding_type is 'learned', only 'sine'"),
    ({'auxiliary_loss': True}, 'auxiliary_loss is True, only False'),
    ({'activation_function': 'silu'}, "activation_function is 'silu', only"),
    ({'backbone_config': BACKBONE | {'backbone': 'resnext50_32x4d'}},
     "backbone is 'resnext50_32x4d', only 'resnet18' or"),
    ({'backbone_config': BACKBONE | {'output_stride': 8}}, 'output_stride is 8, only None or 32'),
    ({'backbone_config': {'model_type': 'swin'}}, "model_type is 'swin', only 'resnet' or"),
    ({'backbone_config': {'model_type': 'resnet', 'out_features': ['stage3']}},
     "out_features is 'stage3', only 'stage4'")])
def test_configs_that_cannot_be_followed_are_refused(saved, tmp_path, config, message):
  with pytest.raises(UserError, match=message):
    tampered(saved(PADDED)[1], tmp_path, lambda _: None, **config)


# Its backbone and encoder as a vision tower.


def test_the_encoder_equals_that_of_torch(saved):
  model, folder = saved(CASES[0])
  checkpoint = Checkpoint(folder, 'vision')
  variables, report = checkpoint.load()
  assert all(re.match(r'model\.(decoder|query)|class_labels|bbox', name)
             for name in report.ignored)
  images, _ = CASES[0].inputs()
  with torch.no_grad():
    expected = model.model(torch.tensor(images.transpose(0, 3, 1, 2))
                           ).encoder_last_hidden_state.numpy()
  found = jax.jit(checkpoint.module.apply)(variables, images)
  assert found.shape == (2, 7, 5, 16)
  assert_close([np.asarray(found).reshape(expected.shape)], [expected])
  # Padding changes nothing: the same pictures in a larger input.
  padded = np.pad(images, ((0, 0), (0, 31), (0, 26), (0, 0)), constant_values=1)
  extent = np.array([images.shape[1:3]] * 2, np.int32)
  inside = jax.jit(checkpoint.module.apply)(variables, padded, extent)[:, :7, :5]
  assert_close([np.asarray(inside)], [found])


def test_detection_starts_from_it_and_its_checkpoint_is_read_again(saved, tmp_path):
  model, folder = saved(PADDED)
  c = tiny.changed(model__vision__pretrained=str(folder), optimizer__layer_decay=0.5,
                   mixer__tasks=('detection',), mixer__weights=(1.0,), train__steps=2)
  for key in ('hidden_dim', 'mlp_dim', 'num_heads', 'num_layers', 'patch_size'):
    if key in c.model.vision:
      c.model.vision[key] = None
  plan = Plan(c, str(tmp_path / 'run'))
  assert any('ignored' in note and 'bbox_predictor' in note for note in plan.notes)
  found = {name.removeprefix('backbone/vision_tower/'): float(np.max(x)) for name, x in
           rates(plan.config.optimizer, plan.abstract.params).items() if 'vision_tower' in name}
  assert found['encoder_layers/mlp/up/kernel'] == 0.5
  assert found['resnet/stage3_block1/conv1/kernel'] == 0.5 ** 3
  assert found['resnet/stem/kernel'] == 0.5 ** 7
  tiny.train(tmp_path / 'run', c)
  predictor = Predictor(str(tmp_path / 'run'))
  expected = model.model.input_projection.weight.detach().numpy()[..., 0, 0].T
  module, variables, _ = predictor.tower('vision')
  assert module.backbone == Checkpoint(folder, 'vision').module.backbone
  kernel = variables['params']['input_projection']['kernel']
  np.testing.assert_allclose(kernel, expected, atol=2.5 * c.optimizer.learning_rate)
  assert not np.array_equal(kernel, expected)


def test_what_transformers_has_no_place_for_is_not_written():
  module = Detr(ResNet('bottleneck', (1,), (16,), dilate_last_stage=True), ('cat',))
  with pytest.raises(UserError, match='dilate_last_stage True have no counterpart'):
    family_of_module(module).config_from_module(module)


def test_masks_and_sizes_that_do_not_fit_are_refused():
  module = Detr(ResNet('basic', (1,), (8,), 8), ('cat',), 12, 3, 1, 2, 8, 1, 2, 8)
  images = np.zeros((2, 16, 24, 3), np.float32)
  for changed, mask, message in (
      ({}, np.ones((2, 24, 16), bool), r'mask is \(2, 24, 16\), \(2, 16, 24\) is wanted'),
      ({'num_heads': 5}, None, 'hidden_dim 12 does not divide by 5'),
      ({'hidden_dim': 6}, None, 'hidden_dim 6 does not divide by 4'),
      ({'backbone': ResNet('basic', (1,), (8,), 8, dilate_last_stage=True)}, None,
       "dilate_last_stage is of blocks 'bottleneck', found 'basic'")):
    with pytest.raises(UserError, match=message):
      init_shapes(module.clone(**changed), images, mask)


# Sharding


def test_every_parameter_has_a_rule_and_no_large_one_stays_whole():
  module = Detr(ResNet('bottleneck', (3, 4, 6, 3), (256, 512, 1024, 2048)), ('thing',) * 91)
  mesh = types.SimpleNamespace(shape={'data': 1, 'fsdp': 8, 'tensor': 1})
  for path, x in jax.tree_util.tree_leaves_with_path(detr.variable_shapes(module)):
    spec = spec_for(path_name(path), x.shape, mesh)
    assert x.size < 100_000 or 'fsdp' in jax.tree.leaves(tuple(spec)), path_name(path)
