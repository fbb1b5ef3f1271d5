"""Latency of the first query to a loaded model, and of later queries.

`xmodal bench predict [--checkpoint DIR] [--image F] [--tasks T ...] [--rounds N]`
sends each task one query and then N others with other words, names and texts. Only a task's first
query compiles, because the text is an input of the compiled program. Without a checkpoint it uses
an untrained model of the size `tiny`, whose latency is the same. JAX's compilation cache is off.
"""

import argparse
from collections.abc import Callable
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from xmodal import config as configs
from xmodal.bench.harness import check_positive, run_command
from xmodal.errors import UserError

# Queries of each task, in turn. They differ in the number of names and texts.
QUESTIONS = {
    'vqa': ('how many circles are there?', 'what is red?', 'is there a blue square?'),
    'objects': ('',),
    'detection': ('red circle.', 'green cross. blue square. purple triangle.', 'zebra. grey wolf'),
    'captioning': ('',),
    'retrieval': ('a red circle.', 'a blue square. two crosses. a cat on a mat', 'nothing. a dog'),
    'regression': ('how many circles are there?', 'how far is the red circle?'),
}


def make_checkpoint(folder: str, config=None, parameters: Callable[[Any], Any] | None = None
                    ) -> str:
  """Writes a workdir with an untrained model; returns it.

  Args:
    folder: the workdir.
    config: None: a `tiny` model for QUESTIONS' tasks except regression.
    parameters: called with the train.plan.Plan, gives the parameters; None: random ones.
  """
  from xmodal.train import build
  from xmodal.train.checkpoints import checkpoint
  from xmodal.train.plan import Plan
  from xmodal.train.steps import state as states

  if config is None:
    config = configs.base()
    config.mixer.tasks = ('vqa', 'objects', 'detection', 'captioning', 'retrieval')
    config.mixer.weights = (1.0,) * len(config.mixer.tasks)
    config.data.train_examples, config.data.eval_examples, config.train.batch_size = 500, 8, 8
  run = Plan(config, folder)
  build.save_assets(run.config, run.tokenizer, run.tasks, run.towers, run.assets)
  checkpoints = checkpoint.Checkpoints(folder, 1)
  state = states.create(run.init, run.abstract)
  if parameters is not None:
    state = state.replace(params=parameters(run))
  checkpoints.save(state, run.assets)
  checkpoints.close()
  return folder


def measure(predictor, image: str, tasks, rounds: int) -> dict[str, list[float]]:
  """Seconds of each query of each task, in order."""
  seconds = {}
  for name in tasks:
    texts = QUESTIONS[name]
    for number in range(rounds + 1):
      began = time.perf_counter()
      task, examples = predictor.task(name).query(image, texts[number % len(texts)])
      _, predictions = predictor(examples, task)
      task.describe(task.join(examples, predictions))
      seconds.setdefault(name, []).append(time.perf_counter() - began)
  return seconds


def table(seconds: dict[str, list[float]]) -> str:
  """Formats seconds of the first query; of later ones the second, median and slowest in ms."""
  rows = [f'{"task":<12}{"first s":>10}{"second ms":>11}{"median ms":>11}{"slowest ms":>12}']
  for name, (first, *others) in seconds.items():
    rows.append(f'{name:<12}{first:>10.2f}{1e3 * others[0]:>11.1f}'
                f'{1e3 * statistics.median(others):>11.1f}{1e3 * max(others):>12.1f}')
  return '\n'.join(rows)


def _run(options):
  import jax
  from PIL import Image

  from xmodal.predictor import Predictor

  check_positive(options, 'rounds')
  jax.config.update('jax_enable_compilation_cache', False)
  with tempfile.TemporaryDirectory() as folder:
    predictor = Predictor(options.checkpoint or make_checkpoint(os.path.join(folder, 'run')))
    image = options.image
    if image is None:
      image = os.path.join(folder, 'image.png')
      noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
      Image.fromarray(noise).save(image)
    tasks = options.tasks or [name for name in predictor.tasks if name in QUESTIONS]
    if unknown := [name for name in tasks if name not in QUESTIONS or name not in predictor.tasks]:
      raise UserError(f'--tasks {unknown[0]}: wanted some of '
                      f'{", ".join(name for name in predictor.tasks if name in QUESTIONS)}')
    found = measure(predictor, image, tasks, options.rounds)
    print(f'{jax.devices()[0].device_kind}, {predictor.config.model.size} model, one picture\n'
          f'{table(found)}')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench predict', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', metavar='DIR', help='a workdir, or one of its '
                      'checkpoints/STEP folders')
  parser.add_argument('--image', metavar='F', help='picture of the queries; default: noise')
  parser.add_argument('--tasks', nargs='+', metavar='T', help="default: all of the model's tasks")
  parser.add_argument('--rounds', type=int, default=20, help='queries after the first')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
