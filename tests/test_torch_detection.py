"""The PyTorch DETR of bench.detection trains as in the paper, and like ours."""

import types

import jax
import numpy as np
import pytest
import torch

from xmodal.bench import parity_detection, torch_detection
from xmodal.bench.torch_optimizer import make_optimizer
from xmodal.train.optimizer.optimizer import decays

torch.set_num_threads(2)
CASE = parity_detection.CASES[1]
OPTIMIZER = types.SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, clip_norm=1., b1=0.9,
                                  b2=0.999, eps=1e-8)
BOXES = np.array([[[0.1, 0.2, 0.5, 0.4], [0.6, 0.1, 0.9, 0.7]], [[0., 0., 1., 0.5]] * 2,
                  [[0., 0., 0., 0.]] * 2], np.float32)
NAMES = np.array([[3, 0], [6, -1], [-1, -1]])


@pytest.fixture
def model():
  return torch_detection.make_model(CASE.backbone, {**CASE.config, 'dropout': 0.0})


@pytest.fixture(scope='module')
def batch():
  return torch_detection.to_torch(*CASE.inputs(), BOXES, NAMES, 'cpu')


def test_labels_are_centres_and_sizes_of_the_objects_that_are_there(batch):
  *_, labels = batch
  assert [label['class_labels'].tolist() for label in labels] == [[3, 0], [6], []]
  np.testing.assert_allclose(labels[0]['boxes'],
                             [[0.3, 0.3, 0.4, 0.2], [0.75, 0.4, 0.3, 0.6]], atol=1e-6)
  np.testing.assert_allclose(labels[1]['boxes'], [[0.5, 0.25, 1, 0.5]])
  assert labels[2]['boxes'].shape == (0, 4)


def test_a_step_has_the_loss_of_transformers_and_trains_what_the_paper_trains(model, batch):
  pixel_values, pixel_mask, labels = batch
  expected = model(pixel_values, pixel_mask=pixel_mask, labels=labels).loss.item()
  before = {name: x.clone() for name, x in model.state_dict().items()}
  step = torch_detection.make_train_step(model, OPTIMIZER)
  losses = [step(*batch)[0].item() for _ in range(8)]
  assert losses[0] == pytest.approx(expected, rel=1e-6)
  assert losses[-1] < 0.9 * losses[0]
  for name, x in model.state_dict().items():
    frozen = 'embedder' in name or 'encoder.stages.0.' in name or 'normalization' in name
    assert torch.equal(x, before[name]) == frozen, name


def test_inference_is_that_of_our_module_with_the_same_numbers(model, batch):
  pixel_values, pixel_mask, _ = batch
  module, variables = torch_detection.in_jax(model)
  ours = jax.jit(module.apply)(variables, *CASE.inputs())
  theirs = torch_detection.make_infer(model)(pixel_values, pixel_mask)
  half = torch_detection.make_infer(model, half=True)(pixel_values, pixel_mask)
  for a, b, c in zip(ours, theirs, half):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert 0 < (b - c).abs().max() < 0.1
  assert model.training


def test_in_16_bits_the_loss_is_close(model, batch):
  exact, half = (torch_detection.make_train_step(model, OPTIMIZER, half=half)(*batch)[0].item()
                 for half in (False, True))
  assert exact != half == pytest.approx(exact, rel=0.1)


def test_weight_decay_is_of_the_same_parameters_as_ours(model):
  for parameter in model.parameters():
    parameter.requires_grad_(True)
  for group in make_optimizer(model, OPTIMIZER, torch_detection.decays).param_groups:
    for parameter in group['params']:
      parameter.data.fill_(group['weight_decay'] > 0)
  _, variables = torch_detection.in_jax(model)
  params = variables['params']
  for (path, theirs), ours in zip(jax.tree_util.tree_leaves_with_path(params),
                                  jax.tree.leaves(decays(params)), strict=True):
    if '_norm' in jax.tree_util.keystr(path) and 'resnet' in jax.tree_util.keystr(path):
      assert not ours  # buffers in torch
    else:
      np.testing.assert_array_equal(theirs, float(ours), str(path))
