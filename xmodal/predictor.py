"""A trained model, from a checkpoint folder alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from xmodal import config as configs
from xmodal import target
from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.data.pipeline import BatchMaker
from xmodal.errors import UserError
from xmodal.mixer.feed import task_config
from xmodal.models import lora
from xmodal.models.names import pad_names, program_size
from xmodal.models.quantized import ROUNDINGS, quantize
from xmodal.pretrained.preprocessing import Preprocessing
from xmodal.tasks.task import Task, senses_of
from xmodal.train import build
from xmodal.train.checkpoints import checkpoint
from xmodal.train.start.pretrained import load_towers
from xmodal.xla import integer_options

PRECISIONS = ('float32', 'bfloat16', *ROUNDINGS)
AT_ONCE = 32  # pictures, whatever the number in a folder


class Predictor:
  """A model with its parameters, from a checkpoint folder alone."""

  def __init__(self, folder: str, decode: Callable[..., images.Decoded] = images.decode,
               precision: str = ''):
    """Loads a workdir's newest checkpoint, or one checkpoints/STEP folder.

    Args:
      folder: either of them, on this machine or in a bucket.
      decode: what opens pictures: images.decode, or one that remembers.
      precision: one of PRECISIONS for the weights; '': that of config.model.quantize, or float32.

    Raises:
      UserError: there is none, it is damaged, or the precision is unknown.
    """
    if precision and precision not in PRECISIONS:
      raise UserError(f'precision {precision!r}: wanted one of {", ".join(PRECISIONS)}')
    self._step, self._decode = checkpoint.find(folder), decode
    local = checkpoint.local_copy(self._step)
    assets = os.path.join(local, checkpoint.ASSETS)
    self.config = configs.load(os.path.join(assets, 'config.json'))
    self.tokenizer, self.tasks = build.load_assets(self.config, assets)
    self.towers = load_towers(assets)
    self.model = build.make_model(self.config, self.tokenizer, self.tasks, self.towers)
    batch = self.batch([])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: self.model.init(jax.random.key(0), batch, deterministic=True)))
    self.variables = checkpoint.load_variables(
        local, abstract, ema=self.config.train.ema_decay > 0)
    self._store(precision or self.config.model.quantize or 'float32')

  def batch(self, examples: list[Example], tasks: Mapping[str, Task] | None = None,
            least: int = 1) -> dict:
    """The batch that the model is given for some examples, and fillers up to `least`.

    Pictures are fitted to the model's input as those of the first of the tasks are.
    """
    size = self.config.data.image_size
    # A filler is made of record 0: here a picture that costs nothing to open.
    source = [Example(np.zeros((1, 1, 3), np.uint8)), *examples]
    tasks = tasks or self.tasks
    data = task_config(self.config, next(iter(tasks))).data
    make = BatchMaker(source, tasks, (size, size), bad=None, decode=self._decode,
                      keep_aspect=data.keep_aspect, senses=senses_of(tasks))
    records = np.arange(1, max(len(examples), least) + 1)
    batch = make(np.where(records < len(source), records, -1), records)
    for name, task in tasks.items():
      batch[name].update(task.shared())
    return batch

  def tower(self, part: str):
    """One of the towers ('vision' or 'text'): its module, its variables (adapters merged
    into them), and its Preprocessing (None for text)."""
    module = getattr(self.model.backbone, f'{part}_tower')
    variables = {}
    for collection, tree in self.variables.items():
      if (of_tower := tree.get('backbone', {}).get(f'{part}_tower')) is not None:
        variables[collection] = of_tower
    if 'params' in variables:
      variables['params'] = lora.merge(variables['params'], self.config.model.lora)
    if not variables:
      raise UserError(f'{self._step} has no {part} tower: none of its tasks uses one')
    backbone, size = self.model.backbone, self.config.data.image_size
    pictures = Preprocessing((size, size), backbone.image_mean, backbone.image_std)
    return module, variables, pictures if part == 'vision' else None

  @property
  def step(self) -> int | None:
    """The training steps that its parameters had; None: its folder does not say."""
    name = os.path.basename(self._step)
    return int(name) if name.isdigit() else None

  @property
  def workdir(self) -> str:
    """Folder of the run, which holds checkpoints/STEP."""
    return os.path.dirname(os.path.dirname(self._step))

  def task(self, name: str) -> Task:
    """One of the tasks; UserError if the model has none of that name."""
    if name not in self.tasks:
      raise UserError(f'{self._step} was not trained on task {name!r}; wanted one of '
                      f'{", ".join(self.tasks)}')
    return self.tasks[name]

  def __call__(self, examples: list[Example], task: str | Task) -> tuple[np.ndarray, list]:
    """Predictions of one task, by its name or as its `query` gave it, for some examples.

    Returns:
      The pictures as the model saw them, uint8 [N, H, W, 3], and N predictions.

    Raises:
      UserError: a picture cannot be read, or the model has no such task.
    """
    parts = list(self.batches(examples, task))
    return (np.concatenate([pictures for pictures, _ in parts]),
            [prediction for _, predictions in parts for prediction in predictions])

  def batches(self, examples: list[Example], task: str | Task, *,
              fixed: bool = False, sizes: Sequence[int] = ()) -> Iterator[tuple[np.ndarray, list]]:
    """Yields what `__call__` returns, of AT_ONCE examples at a time.

    Args:
      examples, task: see __call__.
      fixed: whether a single batch is filled up to AT_ONCE too, so that one program serves any
        number of examples. Tasks that draw get no fillers.
      sizes: the sizes that a single batch may have, ascending; it is filled up to the next one, or
        to AT_ONCE. (): a power of two, or see `fixed`.
    """
    task = self.task(task) if isinstance(task, str) else task
    names = task.vocabulary()
    if names is not None:
      text_tower = self.model.backbone.text_tower
      names = pad_names(names, self.tokenizer.pad_id, getattr(text_tower, 'max_positions', None))
    for start in range(0, len(examples), AT_ONCE):
      some = examples[start:start + AT_ONCE]
      # The last of several batches is as large as the others, and so compiled with them. A picture
      # more to look at costs less than a program for each number of them; not one more to draw.
      if start or (fixed and not task.draws):
        least = AT_ONCE
      elif task.draws:
        least = 1
      elif sizes:
        least = next((size for size in sizes if size >= len(some)), AT_ONCE)
      else:
        least = program_size(len(some), least=1)
      batch = self.batch(some, {task.name: task}, least)
      if names is not None:
        batch[task.name]['vocabulary'] = names
      arrays = jax.device_get(self.program(task)(self.variables, batch))
      yield batch['image'][:len(some)], task.decode(arrays[task.name])[:len(some)]

  def program(self, task: Task) -> Callable[[dict, dict], dict]:
    """The jitted function (variables, batch) -> arrays of a task as its `query` gave it."""
    return self._kept(task.name, task.head())

  def _compile(self, name, head):
    # What a text asks is in the batch: a program serves all texts that leave the head as it is.
    model = self.model.clone(heads={name: head})
    return jax.jit(lambda variables, batch: model.apply(variables, batch, method='predict'),
                   compiler_options=self._options or None)

  def _store(self, precision):
    """Stores float32 weights in one of PRECISIONS."""
    self._options = {}
    if precision in ROUNDINGS:
      self.variables = {**self.variables, 'params': jax.jit(
          lambda params: quantize(params, ROUNDINGS[precision]))(self.variables['params'])}
      self._options = integer_options(target.platform())
    elif precision == 'bfloat16':
      self.variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32
                                    else x, self.variables)
    self._kept = functools.lru_cache(maxsize=32)(self._compile)
