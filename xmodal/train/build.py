"""From a config to tasks and a model."""

import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from xmodal import config as configs
from xmodal.data.example import Example
from xmodal.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from xmodal.errors import UserError
from xmodal.models.backbone import Backbone, MultiTask
from xmodal.models.cross_modal import CrossModal
from xmodal.models.lora import Lora
from xmodal.models.resnet import ResNet
from xmodal.models.t5 import T5
from xmodal.models.vit import ViT
from xmodal.tasks import task_class
from xmodal.tasks.task import Task


def learn(config, examples: Sequence[Example]) -> tuple[Tokenizer, dict[str, Task]]:
  """Tokenizer and tasks, with their vocabularies learned from training examples."""
  if config.model.text.tokenizer:
    tokenizer = load_tokenizer(config.model.text.tokenizer)
  else:
    tokenizer = train_tokenizer(
        (text for e in examples for text in _texts(e) if text), config.model.text.vocab_size)
  return tokenizer, {name: task_class(name).from_data(config, tokenizer, examples)
                     for name in _task_names(config)}


def _texts(example):
  names = dict.fromkeys(o.name for o in example.objects or ())
  return example.question, *example.answers, *example.captions, *names


def save_assets(config, tokenizer: Tokenizer, tasks: Mapping[str, Task], folder: str) -> None:
  """Writes all that a checkpoint needs beside its parameters: config, tokenizer, lists."""
  tokenizer.save(os.path.join(folder, 'tokenizer'))
  for name, task in tasks.items():
    task.save(os.path.join(folder, name))
  configs.save(config, os.path.join(folder, 'config.json'))


def load_assets(config, folder: str) -> tuple[Tokenizer, dict[str, Task]]:
  """Tokenizer and tasks as save_assets left them; UserError if they are not all there."""
  tokenizer = load_tokenizer(os.path.join(folder, 'tokenizer'))
  try:
    return tokenizer, {
        name: task_class(name).from_files(config, tokenizer, os.path.join(folder, name))
        for name in _task_names(config)}
  except (OSError, ValueError) as error:
    raise UserError(f'{folder} is damaged ({error}): take the assets folder of another '
                    'checkpoint of the run') from error


def task_weights(config) -> dict[str, float]:
  """Weight of each task's loss; UserError if they are not one a task, above 0."""
  names, weights = _task_names(config), tuple(config.mixer.weights)
  if len(names) != len(weights) or min(weights) <= 0:
    raise UserError(f'config.mixer.weights={weights}: wanted a number above 0 for each of '
                    f'config.mixer.tasks={names}')
  return dict(zip(names, map(float, weights)))


def _task_names(config) -> tuple[str, ...]:
  names = tuple(config.mixer.tasks)
  if not names or len(set(names)) != len(names):
    raise UserError(f'config.mixer.tasks={names}: wanted one or more different names')
  return names


def compute_dtype(config):
  """bfloat16 on accelerators and float32 on CPU, unless the config names one."""
  name = config.model.dtype
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  if name not in ('float32', 'bfloat16'):
    raise UserError(f'config.model.dtype={name!r}: wanted auto, float32 or bfloat16')
  return jnp.dtype(name)


def make_model(config, tokenizer: Tokenizer, tasks: Mapping[str, Task]) -> MultiTask:
  """The towers, joined, under the tasks' heads."""
  model = config.model
  if model.cross.variant not in ('co_attention', 'merged'):
    raise UserError(f'config.model.cross.variant={model.cross.variant!r}: wanted co_attention or '
                    'merged')
  if model.attention == 'cudnn' and model.dropout_rate:
    raise UserError(f'config.model.attention=cudnn has no dropout, found config.model.dropout_rate='
                    f'{model.dropout_rate}; set it to 0 or take config.model.attention=xla')
  # Kernels give the same numbers: what was trained on a GPU is used anywhere.
  attention = model.attention if jax.default_backend() == 'gpu' else 'xla'
  shared = dict(dtype=compute_dtype(config), remat=model.remat, attention=attention,
                dropout_rate=model.dropout_rate)
  backbone = Backbone(
      vision_tower=_vision_tower(config, shared),
      text_tower=T5(vocab_size=tokenizer.vocab_size, gated=True, tie_word_embeddings=False,
                    scale_decoder_outputs=False, **_stack(config, 'text', shared)),
      cross_modal=CrossModal(variant=model.cross.variant, **_stack(config, 'cross', shared)),
      pad_id=tokenizer.pad_id)
  return MultiTask(backbone, {name: task.head() for name, task in tasks.items()},
                   Lora(**model.lora))


def _vision_tower(config, shared):
  if config.model.vision.name == 'resnet':
    return ResNet(**configs.tower_sizes(config, 'vision'), dtype=shared['dtype'])
  size = config.data.image_size
  return ViT(image_size=(size, size), use_cls_token=False, **_stack(config, 'vision', shared))


def _stack(config, tower, shared):
  sizes = configs.tower_sizes(config, tower)
  # A few layers run faster as straight code; many compile faster as a loop.
  unroll = sizes['num_layers'] if sizes['num_layers'] <= 4 else 1
  return {**sizes, **shared, 'scan_unroll': unroll}
