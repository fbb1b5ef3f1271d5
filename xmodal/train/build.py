"""Builds the tasks and the model that a config describes."""

from collections.abc import Callable, Mapping, Sequence
import os

import jax.numpy as jnp

from xmodal import config as configs
from xmodal import target
from xmodal.data.example import Example
from xmodal.data.open import IMAGE_SIZE
from xmodal.data.overview import Sampled, learn_tokenizer, overview_of
from xmodal.data.texts import texts_of
from xmodal.data.tokenizer import Tokenizer, load_tokenizer
from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.models.attention import usable
from xmodal.models.joint import Backbone, MultiTask
from xmodal.models.layers import remat_policy
from xmodal.models.lora import Lora
from xmodal.models.quantized import ROUNDINGS
from xmodal.options import ABOVE_ZERO, HIGHEST
from xmodal.tasks.task import TASKS, Task, senses_of
from xmodal.train.start.pretrained import Tower, save_towers
from xmodal.train.towers import decoder_tower, text_tower, vision_tower


def resolve(config, towers: Mapping[str, Tower]):
  """Fills in the values that the config leaves to pretrained towers."""
  config = config.copy_and_resolve_references()
  if config.data.image_size is None:
    config.data.image_size = (max(towers['vision'].preprocessing.image_size)
                              if 'vision' in towers else IMAGE_SIZE)
  return config


def learn(config, examples: Sequence[Example] | Mapping[str, Sequence[Example]],
          tokenizer_folder: str = '', make_tokenizer: Callable[..., Tokenizer] | None = None
          ) -> tuple[Tokenizer, dict[str, Task]]:
  """Makes the tokenizer and the tasks; learns their vocabularies from training examples.

  Args:
    config: the whole config.
    examples: of the training split; a dict by task if tasks have separate sources.
    tokenizer_folder: of the pretrained text tower; config.model.text.tokenizer overrides it.
    make_tokenizer: learns a tokenizer from (texts, vocab_size); used without a folder. None: as
      train_tokenizer.
  """
  names = task_names(config)
  if not isinstance(examples, Mapping):
    examples = dict.fromkeys(names, Sampled(examples))
  if folder := config.model.text.tokenizer or tokenizer_folder:
    tokenizer = load_tokenizer(folder)
  else:
    different = list({id(of_source): of_source for of_source in examples.values()}.values())
    if make_tokenizer:
      tokenizer = make_tokenizer(
          (text for of_source in different for e in of_source for text in texts_of(e) if text),
          config.model.text.vocab_size)
    else:
      tokenizer = learn_tokenizer(list(map(overview_of, different)), config.model.text.vocab_size)
  return tokenizer, {name: TASKS[name].make.from_data(config, tokenizer, examples[name])
                     for name in names}


def save_assets(config, tokenizer: Tokenizer, tasks: Mapping[str, Task],
                towers: Mapping[str, Tower], folder: str) -> None:
  """Writes what a checkpoint needs besides parameters: config, tokenizer, vocabularies, towers."""
  tokenizer.save(os.path.join(folder, 'tokenizer'))
  save_towers(towers, folder)
  for name, task in tasks.items():
    task.save(os.path.join(folder, name))
  configs.save(config, os.path.join(folder, 'config.json'))


def load_assets(config, folder: str) -> tuple[Tokenizer, dict[str, Task]]:
  """Reads the tokenizer and tasks that save_assets wrote; UserError if some are missing."""
  tokenizer = load_tokenizer(os.path.join(folder, 'tokenizer'))
  try:
    return tokenizer, {
        name: TASKS[name].make.from_files(config, tokenizer, os.path.join(folder, name))
        for name in task_names(config)}
  except (OSError, ValueError) as error:
    raise UserError(f'{folder} is damaged ({error}): use the assets folder of another '
                    'checkpoint of the run') from error


def task_weights(config) -> dict[str, float]:
  """Weight of each task's loss; UserError unless there is one per task, finite and above 0."""
  names, weights = task_names(config), tuple(config.mixer.weights)
  if len(names) != len(weights) or not all(
      type(weight) in (int, float) and ABOVE_ZERO <= weight <= HIGHEST
      for weight in weights):
    raise UserError(f'config.mixer.weights={weights}: wanted a finite number above 0 for each of '
                    f'config.mixer.tasks={names}')
  return dict(zip(names, map(float, weights)))


def task_names(config) -> tuple[str, ...]:
  """config.mixer.tasks; UserError if empty, duplicated or unknown."""
  names = tuple(config.mixer.tasks)
  if not names or len(set(names)) != len(names):
    raise UserError(f'config.mixer.tasks={names}: wanted one or more different names')
  for name in names:
    TASKS[name]  # raises UserError if there is none
  return names


def compute_dtype(config):
  """bfloat16 on accelerators and float32 on CPU, unless config.model.dtype names one."""
  name = config.model.dtype
  if name == 'auto':
    name = 'float32' if target.platform() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def make_model(config, tokenizer: Tokenizer, tasks: Mapping[str, Task],
               towers: Mapping[str, Tower] | None = None) -> MultiTask:
  """The model: towers, pretrained (by part) or as the config says, and the tasks' heads."""
  model, towers = config.model, towers or {}
  if model.attention == 'cudnn' and model.dropout_rate:
    raise UserError(f'config.model.attention=cudnn has no dropout, found config.model.dropout_rate='
                    f'{model.dropout_rate}; set it to 0 or use config.model.attention=xla')
  shared = dict(dtype=compute_dtype(config), remat=remat_policy(model.remat),
                attention=usable(model.attention),
                dropout_rate=model.dropout_rate)
  pictures = {}
  if 'vision' in towers:
    preprocessing = towers['vision'].preprocessing
    pictures = {'image_mean': preprocessing.mean, 'image_std': preprocessing.std}
  text = text_tower(config, tokenizer.vocab_size, shared, towers.get('text'))
  backbone = Backbone(
      vision_tower=vision_tower(config, shared, towers.get('vision')),
      text_tower=text,
      cross_modal=parts.build('cross', parts.fields(model, 'cross'), **shared),
      decoder_tower=decoder_tower(config, text, tokenizer.vocab_size, shared),
      pad_id=tokenizer.pad_id, **pictures,
      more_towers={name: parts.build(parts.family(model, name), parts.fields(model, name), **shared)
                   for name in senses_of(tasks)})
  return MultiTask(backbone, {name: task.head() for name, task in tasks.items()},
                   Lora(**model.lora),
                   {name: names for name, task in tasks.items()
                    if (names := task.vocabulary()) is not None},
                   ROUNDINGS.get(model.quantize))
