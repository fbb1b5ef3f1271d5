"""Captured activations, by name, against PyTorch's attentions and hidden states."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from xmodal import pretrained
from xmodal.models import attention
from xmodal.models.capture import capture
from xmodal.train.plan import Plan
from xmodal.train.steps import state as states

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)


def saved(module, folder):
  torch.manual_seed(0)
  for parameter in module.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  module.eval().save_pretrained(folder)
  return pretrained.load(str(folder))


def test_a_scanned_vit_shows_the_weights_and_tokens_of_transformers(tmp_path):
  theirs = transformers.ViTModel(transformers.ViTConfig(
      image_size=16, patch_size=8, attn_implementation='eager', **SIZES), add_pooling_layer=False)
  module, variables = saved(theirs, tmp_path)
  image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(image.transpose(0, 3, 1, 2)), output_attentions=True,
                      output_hidden_states=True)
  output, found = capture(module.clone(scan_unroll=1), variables, image)
  np.testing.assert_allclose(output, module.apply(variables, image), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found['layers/attention/weights'], torch.stack(expected.attentions),
                             rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found['layers/tokens'], torch.stack(expected.hidden_states[1:]),
                             rtol=1e-4, atol=1e-4)
  for changes in (dict(remat='full'), dict(scan_unroll=3)):
    _, again = capture(module.clone(**changes), variables, image, names='weights')
    assert list(again) == ['layers/attention/weights']
    np.testing.assert_allclose(again['layers/attention/weights'],
                               found['layers/attention/weights'], rtol=1e-5, atol=1e-6)


def test_padding_of_a_text_has_no_weight(tmp_path):
  theirs = transformers.BertModel(transformers.BertConfig(
      vocab_size=50, attn_implementation='eager', **SIZES), add_pooling_layer=False)
  module, variables = saved(theirs, tmp_path)
  tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
  mask = tokens != 0
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens), torch.tensor(mask.astype(int)), output_attentions=True)
  _, found = capture(module, variables, tokens, mask, method='encode')
  weights = np.asarray(found['layers/attention/weights'])
  np.testing.assert_allclose(weights, torch.stack(expected.attentions), rtol=1e-4, atol=1e-5)
  assert not weights[..., 3].any()


@pytest.fixture(scope='module')
def run():
  return Plan(tiny.get_config(), 'unused')


@pytest.fixture(scope='module')
def variables(run):
  return states.create(run.init, run.abstract).variables


def test_a_whole_model_shows_all_its_layers_by_name(run, variables):
  batch = run.maker('eval')(np.arange(2), np.arange(2))
  outputs, found = jax.jit(lambda variables, batch: capture(
      run.model, variables, batch, method='predict'))(variables, batch)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), outputs,
               run.model.apply(variables, batch, method='predict'))
  places = {re.sub(r'/\d+$', '', path) for path in found}
  assert {'backbone/vision_tower/layers/attention/weights', 'backbone/vision_tower/layers/tokens',
          'backbone/text_tower/encoder_layers/tokens', 'backbone/cross_modal/layers/tokens',
          'backbone/cross_modal/layers/vision_cross/weights'} <= places
  for path, x in found.items():
    if path.endswith('/weights'):
      total = x.sum(-1)
      assert x.dtype == jnp.float32
      assert np.all(np.isclose(total, 1, atol=1e-5) | (total == 0)), path


def test_nothing_is_computed_where_nobody_looks(run, variables, monkeypatch):
  monkeypatch.setattr(attention, 'attention_weights', lambda *_, **__: pytest.fail('computed'))
  batch = run.maker('eval')(np.arange(2), np.arange(2))
  run.model.apply(variables, batch, method='predict')
  assert 'captured' not in jax.eval_shape(
      lambda: run.model.init(jax.random.key(0), batch, deterministic=True))
