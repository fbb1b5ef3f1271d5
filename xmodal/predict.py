"""Asks a trained model: xmodal predict --checkpoint DIR --image F [--text "..."]."""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import functools
import os
import sys

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from xmodal import atomic, errors, paths
from xmodal import config as configs
from xmodal.data.example import Example
from xmodal.data.pictures import images
from xmodal.data.pipeline import BatchMaker
from xmodal.errors import UserError
from xmodal.mixer.feed import task_config
from xmodal.models import lora
from xmodal.models.names import pad_names, program_size
from xmodal.pretrained.preprocessing import Preprocessing
from xmodal.tasks.task import Task, senses_of
from xmodal.train import build, checkpoint
from xmodal.train.cache import enable_compilation_cache
from xmodal.train.weights import load_towers

AT_ONCE = 32  # pictures, whatever the number in a folder
_OPTIONS = ('n', 'guidance', 'steps', 'seed', 'mask', 'strength')


class Predictor:
  """A model with its parameters, from a checkpoint folder alone."""

  def __init__(self, folder: str, decode: Callable[..., images.Decoded] = images.decode):
    """Loads a workdir's newest checkpoint, or one checkpoints/STEP folder.

    Args:
      folder: either of them.
      decode: what opens pictures: images.decode, or one that remembers.

    Raises:
      UserError: there is none, or it is damaged.
    """
    self._step, self._decode = checkpoint.find(folder), decode
    assets = os.path.join(self._step, checkpoint.ASSETS)
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
        self._step, abstract, ema=self.config.train.ema_decay > 0)
    self._compiled = functools.lru_cache(maxsize=8)(self._compile)

  def batch(self, examples: list[Example], tasks: Mapping[str, Task] | None = None,
            least: int = 1) -> dict:
    """The batch that the model is given for some examples, and fillers up to `least`.

    Pictures are fitted to the model's input as those of the first of the tasks are.
    """
    size = self.config.data.image_size
    source = examples or [Example(np.zeros((1, 1, 3), np.uint8))]
    tasks = tasks or self.tasks
    data = task_config(self.config, next(iter(tasks))).data
    make = BatchMaker(source, tasks, (size, size), bad=None, decode=self._decode,
                      keep_aspect=data.keep_aspect, senses=senses_of(tasks))
    records = np.arange(max(len(examples), least))
    return make(np.where(records < len(source), records, -1), records)

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
    task = self.task(task) if isinstance(task, str) else task
    pictures, predictions = [], []
    asked = task.vocabulary()
    if asked is not None:
      text_tower = self.model.backbone.text_tower
      asked = pad_names(asked, self.tokenizer.pad_id, getattr(text_tower, 'max_positions', None))
    for start in range(0, len(examples), AT_ONCE):
      some = examples[start:start + AT_ONCE]
      # The last of several batches is as large as the others, and so compiled with them. A picture
      # more to look at costs less than a program for each number of them; not one more to draw.
      least = AT_ONCE if start else 1 if task.draws else program_size(len(some), least=1)
      batch = self.batch(some, {task.name: task}, least)
      if asked is not None:
        batch[task.name]['vocabulary'] = asked
      arrays = jax.device_get(self._compiled(task.name, task.head())(self.variables, batch))
      pictures.append(batch['image'][:len(some)])
      predictions += task.decode(arrays[task.name])[:len(some)]
    return np.concatenate(pictures), predictions

  def _compile(self, name, head):
    # What a text asks is in the batch: a program serves all texts that leave the head as it is.
    model = self.model.clone(heads={name: head})
    return jax.jit(lambda variables, batch: model.apply(variables, batch, method='predict'))


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a mistake of the user's)."""
  parser = argparse.ArgumentParser(prog='xmodal predict', description=__doc__)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal.main, or one of its checkpoints/STEP folders')
  parser.add_argument('--image', metavar='F', help='any picture that Pillow opens; for retrieval '
                      'also a folder of them, to be searched for the text; for generation one to '
                      'change, or none')
  parser.add_argument('--text', default='', help='the question; for detection, names with a full '
                      'stop or semicolon after each, or what means one thing: "the square left of '
                      'the cross"; for retrieval, texts to be compared, likewise; for generation, '
                      'what to draw; captioning needs none')
  parser.add_argument('--task', help='one of those the model learned; the first by default')
  parser.add_argument('--output', metavar='F', help='also draw the picture and the answer here')
  drawing = parser.add_argument_group('generation')
  drawing.add_argument('--n', type=int, help='pictures; several make a grid')
  drawing.add_argument('--guidance', type=float,
                       help='how much the text counts: 1 as learned, 3 or so shows it better')
  drawing.add_argument('--steps', type=int, help='of the way from noise to the picture')
  drawing.add_argument('--seed', type=int, help='the same seed draws the same picture; 0')
  drawing.add_argument('--mask', metavar='F', help='a picture as large as --image, white where '
                       'that is to be drawn anew; transparent parts count as black')
  drawing.add_argument('--strength', type=float,
                       help='0..1: how much of --image is to change, where the mask is white')
  args = parser.parse_args(argv)
  return errors.command(lambda: _answer(args), args.output or '')


def _answer(args):
  for name in ('checkpoint', 'image', 'mask', 'output'):
    if given := getattr(args, name):
      setattr(args, name, paths.local(given, f'--{name}'))
  for name in ('image', 'mask'):
    if (path := getattr(args, name)) is not None and not os.path.exists(path):
      raise UserError(f'--{name} {path}: no such file')
  if args.output:
    _check_output(args.output)
  enable_compilation_cache()
  predictor = Predictor(args.checkpoint)
  task = predictor.task(args.task or next(iter(predictor.tasks)))
  given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
  if other := sorted(set(given) - set(task.query_options)):
    raise UserError(f'--{other[0]} means nothing to {task.name}; leave it out')
  if args.image is None and not task.draws:
    raise UserError(f'--image is missing; {task.name} wants a picture')
  if args.output is None and task.draws:
    raise UserError(f'--output is missing; {task.name} wants a file for what it draws')
  if args.image and os.path.isdir(args.image) and not task.takes_folders:
    raise UserError(f'--image {args.image} is a folder; {task.name} wants one picture')
  with contextlib.ExitStack() as closing:
    if 'progress' in task.query_options:
      given['progress'] = closing.enter_context(_Progress(args.n or 1))
    task, examples = task.query(args.image, args.text, **given)
    for note in dict.fromkeys(note for example in examples for note in task.notes(example)):
      print(f'note: {note}', file=sys.stderr)
    pictures, predictions = predictor(examples, task)
  prediction = task.join(examples, predictions)
  print(task.describe(prediction))
  if args.output:
    kind = Image.registered_extensions()[os.path.splitext(args.output)[1].lower()]
    try:
      with atomic.written(args.output, 'wb') as f:
        task.draw(examples[0], pictures[0], prediction).save(f, kind)
    except (OSError, ValueError) as error:
      raise UserError(f'--output {args.output} cannot be written: {error}') from error


def _check_output(path):
  """Raises UserError before the work where a picture could not be written there."""
  if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
    raise UserError(f'--output {path}: no such folder')
  if Image.registered_extensions().get(os.path.splitext(path)[1].lower()) not in Image.SAVE:
    raise UserError(f'--output {path} names no kind of picture; a name ending in .png is wanted')


class _Progress:
  """A bar on a terminal: called with the steps of a picture, gives what is to be told of each."""

  def __init__(self, pictures: int):
    self._rounds, self._bar = -(-pictures // AT_ONCE), None

  def __enter__(self):
    return self

  def __call__(self, steps: int) -> Callable[[int], None] | None:
    if not sys.stderr.isatty():
      return None
    self._bar = tqdm(total=steps * self._rounds, unit='step', dynamic_ncols=True, leave=False)
    return lambda step: self._bar.update(1)

  def __exit__(self, *_):
    if self._bar is not None:
      jax.effects_barrier()
      self._bar.close()


if __name__ == '__main__':
  sys.exit(main())
