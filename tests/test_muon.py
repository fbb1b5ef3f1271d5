"""Muon: equal to torch's for layer matrices; stops, shards and freezes as AdamW does."""

import json
import shutil
import sys

import jax
import numpy as np
import optax
import pytest
from test_sharding import MESHES, run_alone, three_steps
import tiny
import torch

from xmodal.errors import UserError
from xmodal.train.checkpoints.checkpoint import Checkpoints
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.plan import Plan


def with_muon(**values):
  return tiny.changed(optimizer__name='muon', **values)


def test_steps_are_those_of_torch_for_matrices_of_layers_and_of_nadam_for_all_else():
  c = with_muon(optimizer__muon_rate=3.0, optimizer__clip_norm=1e9,
                optimizer__weight_decay=0.0).optimizer
  rng = np.random.default_rng(0)

  def random(*shape):
    return rng.normal(size=shape).astype(np.float32)

  params = {
      'vision_tower': {'layers': {'up': {'kernel': random(2, 24, 40), 'bias': random(2, 40)}}},
      'text_tower': {'encoder_layers': {'down': {'kernel': random(1, 40, 24)}},
                     'token_embedding': {'embedding': random(9, 24)},
                     'lm_head': {'kernel': random(24, 9)}}}
  optimizer = make_optimizer(c, optax.constant_schedule(0.02), params)
  nadam = optax.nadam(0.02, b1=0.9, b2=0.98, eps=c.eps)
  state, nadam_state, ours, of_nadam = optimizer.init(params), nadam.init(params), params, params
  start, shape = jax.tree.flatten(params)
  matrices = {i: [torch.nn.Parameter(torch.tensor(layer)) for layer in x]
              for i, x in enumerate(start) if x.ndim == 3}
  of_torch = torch.optim.Muon(sum(matrices.values(), []), lr=0.06, weight_decay=0.0, momentum=0.95,
                              adjust_lr_fn='match_rms_adamw')
  mean = [random(*x.shape) for x in start]
  for _ in range(4):
    gradients = [m + 0.3 * random(*m.shape) for m in mean]
    for i, layers in matrices.items():
      for layer, gradient in zip(layers, gradients[i], strict=True):
        layer.grad = torch.tensor(gradient)
    of_torch.step()
    gradients = jax.tree.unflatten(shape, gradients)
    updates, state = optimizer.update(gradients, state, ours)
    ours = optax.apply_updates(ours, updates)
    updates, nadam_state = nadam.update(gradients, nadam_state, of_nadam)
    of_nadam = optax.apply_updates(of_nadam, updates)
  for i, (x, theirs, first) in enumerate(zip(
      jax.tree.leaves(ours), jax.tree.leaves(of_nadam), start, strict=True)):
    if i in matrices:  # torch's Newton-Schulz iterations are in 16 bits
      theirs = np.stack([layer.detach().numpy() for layer in matrices[i]])
    size, error = np.linalg.norm(theirs - first), np.linalg.norm(x - theirs)
    assert size > 0.1 and error < (0.03 if i in matrices else 1e-5) * size
  assert len(matrices) == 2


def test_decay_is_that_of_adamw():
  params = {'layers': {'up': {'kernel': np.ones((1, 4, 4), np.float32),
                              'bias': np.ones((1, 4), np.float32)}},
            'stem': {'kernel': np.ones((4, 4), np.float32)}}
  c = with_muon(optimizer__muon_rate=3.0, optimizer__weight_decay=0.5).optimizer
  optimizer = make_optimizer(c, optax.constant_schedule(0.1), params)
  zero = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  assert updates['layers']['up']['kernel'] == pytest.approx(-0.05)
  assert updates['stem']['kernel'] == pytest.approx(-0.05)
  assert not updates['layers']['up']['bias'].any()


def test_another_name_is_a_mistake():
  c = tiny.changed(optimizer__name='sgd').optimizer
  with pytest.raises(UserError, match="no optimizer 'sgd'; wanted one of adamw, muon"):
    make_optimizer(c, optax.constant_schedule(0.1), {})


@pytest.fixture(scope='module')
def run():
  return Plan(with_muon(optimizer__frozen='text_tower'), 'unused')


def stored(run, workdir):
  checkpoints = Checkpoints(str(workdir), keep=5)
  state = checkpoints.restore(run.abstract, pytest.fail)
  checkpoints.close()
  return state


def test_a_run_with_a_frozen_tower_goes_on_bit_for_bit(run, tmp_path):
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  tiny.train(whole, run.config)
  shutil.copytree(whole, cut)
  shutil.rmtree(cut / 'checkpoints' / '6')
  tiny.train(cut, run.config)
  assert json.loads((cut / 'final.json').read_text())['resumed_from'] == 3
  jax.tree.map(np.testing.assert_array_equal, stored(run, cut), stored(run, whole))


def test_on_eight_devices_it_learns_as_on_one(tmp_path):
  one = three_steps((1, 1, 1), tmp_path / 'one.npz', with_muon())
  eight = run_alone(__file__, tmp_path / 'eight.npz')
  for a, b in zip(one['metrics'], eight['metrics'], strict=True):
    assert b['loss'] == pytest.approx(a['loss'], rel=2e-4)
  assert eight['held'] < 0.4
  one, eight = np.load(tmp_path / 'one.npz'), np.load(tmp_path / 'eight.npz')
  assert set(one) == set(eight)
  kernels = [name for name in one if name.startswith('moved') and 'layers/' in name
             and name.endswith('kernel')]
  assert len(kernels) > 20
  for name in kernels:
    size = np.linalg.norm(one[name])
    assert size > 0 and np.linalg.norm(eight[name] - one[name]) < 0.01 * size, name


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  print(json.dumps(three_steps(MESHES['all'], sys.argv[1], with_muon())))
