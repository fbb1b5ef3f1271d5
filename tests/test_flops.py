"""FLOPs of our step against PyTorch's counter on the same model, and published figures."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xmodal.bench import torch_reference, train_step
from xmodal.cost import flops, machines
from xmodal.models import layers


def test_as_many_as_pytorch_counts_for_the_same_step():
  changes = ('data.image_size=32', 'model.text.hidden_dim=384', 'model.cross.num_layers=2')
  config = train_step.make_config('small', 4, changes)
  batch = train_step.make_batch(config)
  ours = train_step.Ours(config, batch)
  counted = flops.count(ours._step.trace(ours.state, ours.batch).jaxpr)
  model = torch_reference.Reference(config, train_step._VOCAB, train_step._ANSWERS,
                                    train_step._PAD).train()
  theirs = train_step.Torch('eager', model, config, batch)
  with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    theirs()
  assert counted.model == counted.hardware
  assert counted.model == pytest.approx(counter.get_total_flops(), rel=1e-5)


@pytest.mark.parametrize('strides, transposed', [(1, False), (2, False), (2, True)])
def test_convolutions_and_their_gradients_as_pytorch_counts_them(strides, transposed):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
  kernel = rng.normal(size=(strides, strides, 4, 8)).astype(np.float32)

  def ours(x, kernel):
    if transposed:
      return jax.lax.conv_transpose(x, kernel, (strides, strides), 'VALID').sum()
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), 'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')).sum()

  counted = flops.count(jax.jit(jax.grad(ours, argnums=(0, 1))).trace(x, kernel).jaxpr)
  forward = flops.count(jax.jit(ours).trace(x, kernel).jaxpr)
  pictures = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
  if transposed:
    weight = torch.tensor(kernel).permute(2, 3, 0, 1).requires_grad_()
    run = torch.nn.functional.conv_transpose2d
  else:
    weight = torch.tensor(kernel).permute(3, 2, 0, 1).requires_grad_()
    run = torch.nn.functional.conv2d
  with FlopCounterMode(display=False) as counter:
    y = run(pictures, weight, stride=strides)
    assert forward.model == counter.get_total_flops()
    y.sum().backward()
  # Without a use of its value, the forward convolution is not part of the gradient's program.
  assert counted.model in (counter.get_total_flops(), counter.get_total_flops() - forward.model)


@pytest.mark.parametrize('remat, again', [('none', 0.0), ('full', 1 / 3)])
def test_recomputed_layers_count_as_work_of_the_hardware_alone(remat, again):
  def layer(x, kernel):
    return jnp.tanh(x @ kernel) @ kernel.T, None

  if remat == 'full':
    layer = jax.checkpoint(layer)

  def loss(kernels, x):
    return jnp.sum(jax.lax.scan(layer, x, kernels)[0] ** 2)

  traced = jax.jit(jax.grad(loss)).trace(jnp.ones((3, 8, 16)), jnp.ones((4, 8)))
  counted = flops.count(traced.jaxpr)
  forward = 3 * 2 * 2 * 4 * 8 * 16
  assert counted.model == 3 * forward
  # The last product's result is not needed again.
  assert counted.hardware == counted.model + (forward / 2 if again else 0)


@pytest.mark.parametrize('remat, again', [('none', 0), ('dots', 0), ('full', 1)])
def test_no_linear_layer_is_computed_again_under_dots(remat, again):
  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = layers.Mlp(32, 16, name='layer')
      return layers.scan_layers(lambda layer, x, _: (x + layer(x), None), layer, x, num_layers=3,
                                remat=remat)[0]

  x = jnp.ones((4, 16))
  params = jax.eval_shape(Stack().init, jax.random.key(0), x)
  counted = flops.count(jax.jit(jax.grad(
      lambda params, x: jnp.sum(Stack().apply(params, x) ** 2))).trace(params, x).jaxpr)
  forward = 3 * 2 * 2 * 4 * 16 * 32
  # The last product of a layer is not needed again. No gradient by the first layer's input.
  assert counted.model == 3 * forward
  assert counted.hardware - counted.model == again * forward / 2


@pytest.mark.parametrize('kind, name', [
    ('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H200', 'h200'), ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('TPU v4', 'v4'), ('TPU v5 lite', 'v5e'), ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'),
    ('TPU v6 lite', 'v6e'), ('cpu', None), ('NVIDIA T4', None)])
def test_machines_by_the_names_that_jax_gives_their_devices(kind, name):
  assert machines.find(kind) == (name and machines.MACHINES[name])


def test_utilization_of_several_devices():
  # Half of the peak of two H100, 989 TFLOP/s each.
  assert machines.utilization(989e12, 1.0, ['NVIDIA H100 80GB HBM3'] * 2) == pytest.approx(0.5)
  assert machines.utilization(989e12, 1.0, ['NVIDIA H100 80GB HBM3', 'cpu']) is None


def test_parts_of_several_devices_count_as_the_whole():
  mesh = jax.sharding.AbstractMesh((2, 3), ('data', 'tensor'), (jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec('data')

  def loss(x, kernels, part=lambda product, **_: product):
    product = part(jnp.matmul, in_specs=(spec, spec), out_specs=spec, axis_names={'data'})
    return jnp.sum(product(x, kernels) ** 2)

  args = jnp.ones((4, 6, 8)), jnp.ones((4, 8, 5))
  with jax.sharding.use_abstract_mesh(mesh):
    split = jax.jit(jax.grad(functools.partial(loss, part=jax.shard_map), (0, 1))).trace(*args)
  whole = jax.jit(jax.grad(loss, (0, 1))).trace(*args)
  assert flops.count(split.jaxpr) == flops.count(whole.jaxpr) == (5760, 5760)
