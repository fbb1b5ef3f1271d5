"""Small randomised models of each vision family (PyTorch) to compare ours with.

Imports torch and transformers only when a case is made.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any

import numpy as np

from xmodal.pretrained.files import TensorFiles, read_json


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration of a family.

  Attributes:
    family: config.json's model_type.
    description: what is unusual about it.
    make: () -> the torch model in eval mode, with all parameters and statistics random; has
      `save_pretrained`.
    run: (torch model, images float32 [B, H, W, 3]) -> its tokens [B, E + N, D] or
      feature map [B, H', W', C], float32.
    image_size: (height, width) of the input pictures.
    fields: fields of our module that differ from the checkpoint's.
  """

  family: str
  description: str
  make: Callable[[], Any]
  run: Callable[[Any, np.ndarray], np.ndarray]
  image_size: tuple[int, int]
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def load(self, folder: str):
    """Reads the torch model, in eval mode, from a folder that ours was exported to."""
    return load(folder)[0]

  def images(self, count: int = 2) -> np.ndarray:
    """Noise, float32 [count, H, W, 3]."""
    shape = (count, *self.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)

  def inputs(self) -> tuple[np.ndarray]:
    """Inputs of both models."""
    return (self.images(),)


def randomise(model, scale=0.2):
  """Adds noise to all parameters: zero biases, unit norms and variances would hide errors."""
  import torch
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor += noise.abs() if name.endswith('running_var') else scale * noise
  return model.eval()


def load(folder):
  """The torch model of an exported folder, and the missing, unexpected or mismatched names."""
  import torch
  import transformers
  config = read_json(os.path.join(folder, 'config.json'))
  if 'architecture' in config:
    model = torch_vgg(config['architecture'])
    told = model.load_state_dict(
        {name: torch.tensor(array) for name, array in TensorFiles(folder).items()}, strict=False)
    return model, {*told.missing_keys, *told.unexpected_keys}
  model, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
  return model.eval(), {*told['missing_keys'], *told['unexpected_keys'], *told['mismatched_keys']}


def _make(name, config, scale=0.2):
  import torch
  import transformers
  torch.manual_seed(0)
  model, config_class = getattr(transformers, f'{name}Model'), f'{name}Config'
  return randomise(model(getattr(transformers, config_class)(**config)), scale)


def run(model, images, **kwargs):
  """Tokens [B, E + N, D] or feature map [B, H', W', C] of a torch model; see Case.run."""
  import torch
  if hasattr(model, 'vision_model'):  # a model of two towers
    model = model.vision_model
  with torch.no_grad():
    output = model(torch.tensor(images.transpose(0, 3, 1, 2)), **kwargs)
  output = getattr(output, 'last_hidden_state', output).numpy()
  return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output


def vgg_layers(name):
  """`features` of torchvision's VGG of this name."""
  from torch import nn
  letters = {'vgg11': '64 M 128 M 256 256 M 512 512 M 512 512 M',
             'vgg13': '64 64 M 128 128 M 256 256 M 512 512 M 512 512 M',
             'vgg16': '64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M',
             'vgg19': '64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M'}
  layers, width = [], 3
  for letter in letters[name.removesuffix('_bn')].split():
    if letter == 'M':
      layers.append(nn.MaxPool2d(2, 2))
      continue
    layers.append(nn.Conv2d(width, int(letter), 3, padding=1))
    width = int(letter)
    if name.endswith('_bn'):
      layers.append(nn.BatchNorm2d(width))
    layers.append(nn.ReLU(inplace=True))
  return nn.Sequential(*layers)


def torch_vgg(name):
  """torchvision's VGG of this name, randomised, with a narrower classifier."""
  import torch
  from torch import nn

  class TorchVGG(nn.Module):
    """torchvision.models.VGG, with the same tensor names and features."""

    def __init__(self):
      super().__init__()
      self.features = vgg_layers(name)
      self.classifier = nn.Sequential(
          nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(),
          nn.Linear(8, 10))

    def forward(self, images):
      return self.features(images)

    def save_pretrained(self, folder):
      """Saves the tensors only, as torchvision does, without a config."""
      from safetensors.torch import save_file
      save_file(self.state_dict(), os.path.join(folder, 'model.safetensors'))

  torch.manual_seed(0)
  # Noise as large as in the other cases would dominate sums over 9 x 512 values.
  return randomise(TorchVGG(), scale=0.02)


def _cases():

  def case(family, name, description, config, image_size, fields=None, **kwargs):
    return Case(family, description, functools.partial(_make, name, config),
                functools.partial(run, **kwargs), image_size, fields or {})

  vit = dict(hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=28,
             image_size=(24, 32), patch_size=8)
  interpolate = dict(interpolate_pos_encoding=True)
  for family, name in (('vit', 'ViT'), ('deit', 'DeiT')):
    yield case(family, name, '3 heads of 5, 24 x 32 pixels', vit, (24, 32))
    yield case(family, name, '5 heads of 3, tanh GELU, patches of 4',
               {**vit, 'num_attention_heads': 5, 'patch_size': 4, 'hidden_act': 'gelu_new'},
               (24, 32))
    yield case(family, name, '1 head, eps 1e-3, no bias of query, key, value',
               {**vit, 'num_attention_heads': 1, 'layer_norm_eps': 1e-3, 'qkv_bias': False,
                'patch_size': 16, 'image_size': 48}, (48, 48))
    yield case(family, name, '32 x 32 pixels read at 56 x 24', {**vit, 'image_size': 32},
               (56, 24), dict(image_size=(56, 24)), **interpolate)
    yield case(family, name, '32 x 32 pixels read at 16 x 64, as many patches',
               {**vit, 'image_size': 32}, (16, 64), dict(image_size=(16, 64)), **interpolate)

  dino = dict(hidden_size=15, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2,
              image_size=28, patch_size=7, layerscale_value=0.4)
  for family, name, more in (
      ('dinov2', 'Dinov2', {}),
      ('dinov2_with_registers', 'Dinov2WithRegisters', dict(num_register_tokens=3))):
    dino = {**dino, **more}
    yield case(family, name, '3 heads of 5, MLP of 2 times the width', dino, (28, 28))
    yield case(family, name, 'SwiGLU, 5 heads of 3, eps 1e-3',
               {**dino, 'use_swiglu_ffn': True, 'num_attention_heads': 5, 'mlp_ratio': 4,
                'layer_norm_eps': 1e-3}, (28, 28))
    yield case(family, name, 'tanh GELU, no bias of query, key, value',
               {**dino, 'hidden_act': 'gelu_pytorch_tanh', 'qkv_bias': False}, (28, 28))
    yield case(family, name, '28 x 28 pixels read at 42 x 21', dino, (42, 21),
               dict(image_size=(42, 21)))
    yield case(family, name, '63 x 63 pixels read at 28 x 77', {**dino, 'image_size': 63},
               (28, 77), dict(image_size=(28, 77)))
  yield case('dinov2_with_registers', 'Dinov2WithRegisters', '1 register, layer scale 1',
             {**dino, 'num_register_tokens': 1, 'layerscale_value': 1.0}, (28, 28))

  siglip = dict(hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=28,
                image_size=32, patch_size=8)
  yield case('siglip_vision_model', 'SiglipVision', '3 heads of 5', siglip, (32, 32))
  yield case('siglip_vision_model', 'SiglipVision', 'exact GELU, 5 heads of 3, eps 1e-3, no head',
             {**siglip, 'hidden_act': 'gelu', 'num_attention_heads': 5, 'layer_norm_eps': 1e-3,
              'vision_use_head': False}, (32, 32))
  yield case('siglip_vision_model', 'SiglipVision', '32 x 32 pixels read at 24 x 56', siglip,
             (24, 56), dict(image_size=(24, 56)), **interpolate)
  text = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
              vocab_size=20, projection_size=15)
  yield case('siglip', 'Siglip', 'both towers in the file', dict(
      text_config=text, vision_config={**siglip, 'num_attention_heads': 1, 'patch_size': 16}),
      (32, 32))

  resnet = dict(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 1])
  for description, config in (
      ('basic blocks', dict(layer_type='basic')),
      ('bottleneck blocks (v1.5)', dict(layer_type='bottleneck')),
      ('bottleneck blocks (v1)', dict(layer_type='bottleneck', downsample_in_bottleneck=True)),
      ('basic blocks, 5 stages, the first strides too',
       dict(layer_type='basic', downsample_in_first_stage=True, hidden_sizes=[12, 12, 16, 24, 40],
            depths=[1, 1, 2, 1, 1]))):
    yield case('resnet', 'ResNet', description, {**resnet, **config}, (65, 97))

  for name, size in (('vgg11', (64, 96)), ('vgg13_bn', (67, 33)), ('vgg16', (32, 64)),
                     ('vgg16_bn', (45, 64)), ('vgg19', (63, 32))):
    yield Case('vgg', f'{name}, {size[0]} x {size[1]} pixels', functools.partial(torch_vgg, name),
               run, size)


def _published():
  for family, name, description, config, size in (
      ('vit', 'ViT', 'base, patches of 16', {}, 224),
      ('deit', 'DeiT', 'base, patches of 16', {}, 224),
      ('dinov2', 'Dinov2', 'base, patches of 14', dict(image_size=518), 518),
      ('dinov2_with_registers', 'Dinov2WithRegisters', 'base, patches of 14',
       dict(image_size=518, patch_size=14), 518),
      ('siglip_vision_model', 'SiglipVision', 'base, patches of 16', {}, 224),
      ('resnet', 'ResNet', 'ResNet-50', {}, 224)):
    # Noise as large as in the small cases would dominate sums over a thousand values.
    yield Case(family, description, functools.partial(_make, name, config, scale=0.02), run,
               (size, size))
  yield Case('vgg', 'vgg16_bn', functools.partial(torch_vgg, 'vgg16_bn'), run, (224, 224))


CASES = tuple(_cases())
PUBLISHED = tuple(_published())
