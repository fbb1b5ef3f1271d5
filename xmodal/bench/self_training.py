"""Measures self-training: training on a model's own labels of unlabelled pictures.

`xmodal bench self_training [--labelled 4000] [--unlabelled 12000] [--steps 1500] ...`
trains configs/self_training.py on labelled scenes of the embedded shapes, labels pictures of other
scenes with xmodal augment, and trains from scratch on both. Rows of the table, one run per seed:

  labelled             --steps steps on the labelled scenes: the teacher
  labelled, for longer twice the steps: the cost of training twice
  made too             --steps steps on the labelled scenes and the teacher's confident labels
  all labelled         --steps steps with the true labels of all scenes: the upper bound

Repeating the command skips finished runs and resumes a stopped one. The table is table.md, and all
numbers are results.json, both in --workdir.
"""

import argparse
import json
import os
import shutil
import statistics
import sys

from PIL import Image

from xmodal import augment, heap, paths
from xmodal.bench.harness import check_positive, read_config, run_command
from xmodal.bench.multitask import train, write_table
from xmodal.bench.multitask_table import markdown
from xmodal.data.open import IMAGE_SIZE
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError
from xmodal.train.process import stop

# Score of each task in the table; exact: share of captions that are right word for word.
_SCORES = {'vqa': 'accuracy', 'captioning': 'exact'}


def write_pictures(folder: str, source: Shapes, first: int) -> None:
  """Writes scenes from number `first` on as PNG files, and the earlier scenes' questions as text.

  One question per line. The folder is written completely or not at all.
  """
  if os.path.isdir(folder):
    return
  part = f'{folder}.part'
  shutil.rmtree(part, ignore_errors=True)
  os.makedirs(os.path.join(part, 'pictures'))
  for number in range(first, len(source)):
    Image.fromarray(source[number].image).save(os.path.join(part, 'pictures', f'{number:06}.png'))
  with open(os.path.join(part, 'questions.txt'), 'w', encoding='utf-8') as f:
    f.writelines(f'{question}\n' for question in dict.fromkeys(
        source[number].question for number in range(first)))
  os.replace(part, folder)


def label(teacher: str, pictures: str, made: str, options) -> None:
  """Labels the pictures with a run's model, unless that is done."""
  if os.path.exists(os.path.join(made, 'train.jsonl')):
    return
  shutil.rmtree(made, ignore_errors=True)
  code = augment.main([
      '--checkpoint', teacher, '--images', os.path.join(pictures, 'pictures'), '--questions',
      os.path.join(pictures, 'questions.txt'), '--output', made, '--per_picture',
      str(options.per_picture), '--threshold', str(options.threshold)])
  if code:
    raise UserError('labelling failed: see above')


def settings(base, options, made: str) -> dict[str, object]:
  """The config of each row, without seed; made: folder of the teacher's labels."""
  def config(steps, examples, more=()):
    c = base.copy_and_resolve_references()
    c.data.train_examples, c.data.more, c.train.steps = examples, more, steps
    c.train.eval_every = c.train.checkpoint_every = steps
    c.train.samples = 0
    return c

  few, steps = options.labelled, options.steps
  return {'labelled': config(steps, few), 'labelled, for longer': config(2 * steps, few),
          'made too': config(steps, few, (made,)),
          'all labelled': config(steps, few + options.unlabelled)}


def summarise(workdir: str, names, seeds: int) -> dict[str, dict[str, list[float]]]:
  """{row: {task: scores by seed}} of the finished runs."""
  found = {}
  for name in names:
    for seed in range(seeds):
      path = os.path.join(_folder(workdir, seed, name), 'final.json')
      if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
          scores = json.load(f)['evaluation']
        for task, score in _SCORES.items():
          if task in scores:
            found.setdefault(name, {}).setdefault(task, []).append(scores[task][score])
  return found


def results_table(found) -> str:
  """Formats the result of summarise as Markdown: means (maximum minus minimum)."""
  tasks = [task for task in _SCORES if any(task in of_row for of_row in found.values())]
  return markdown(['trained on', 'seeds', *(f'{task} {_SCORES[task]}' for task in tasks)], [
      [name, max(map(len, of_row.values())), *(
          f'{statistics.fmean(of_row[task]):.3f} ({max(of_row[task]) - min(of_row[task]):.3f})'
          for task in tasks)] for name, of_row in found.items()])


def _folder(workdir, seed, name):
  return os.path.join(workdir, f'seed_{seed}', name.replace(', ', '_').replace(' ', '_'))


def _run(options):
  check_positive(options, 'labelled', 'unlabelled', 'steps', 'seeds', 'per_picture')
  base = read_config(options.config)
  if base.data.source != 'shapes' or not {'vqa', 'captioning'} <= set(base.mixer.tasks):
    raise UserError(f'--config={options.config}: wanted vqa and captioning on the embedded shapes, '
                    f'found {", ".join(base.mixer.tasks)} on {base.data.source}')
  workdir = paths.local(options.workdir, '--workdir')

  from xmodal.main import give_threads, use_two_cores
  from xmodal.train.process.compilation_cache import enable_compilation_cache
  use_two_cores(base)
  give_threads()
  enable_compilation_cache()

  pictures = os.path.join(workdir, f'scenes_{options.labelled}_{options.unlabelled}')
  os.makedirs(workdir, exist_ok=True)
  write_pictures(pictures, Shapes(
      'train', size=options.labelled + options.unlabelled,
      image_size=base.data.image_size or IMAGE_SIZE), options.labelled)
  for seed in range(options.seeds):
    made = os.path.join(workdir, f'seed_{seed}',
                        f'made_{options.per_picture}_{options.threshold:g}')
    for name, config in settings(base, options, made).items():
      config.seed = seed
      if name == 'made too':
        label(_folder(workdir, seed, 'labelled'), pictures, made, options)
      if not train(config, _folder(workdir, seed, name)):
        print('stopped; the same command goes on')
        return stop.EXIT_CODE
      found = summarise(workdir, settings(base, options, made), options.seeds)
      write_table(workdir, 'table.md', results_table(found), **found)
  print(f'\n{results_table(found)}\n\nMean over the seeds (maximum minus minimum). In {workdir}: '
        'results.json, and a folder per run')


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/bench_self_training')
  parser.add_argument('--config', default='self_training', help='config of the model and the tasks')
  parser.add_argument('--labelled', type=int, default=4000, help='labelled scenes')
  parser.add_argument('--unlabelled', type=int, default=12_000, help='unlabelled scenes')
  parser.add_argument('--steps', type=int, default=1500)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--per_picture', type=int, default=5, help='questions per picture')
  parser.add_argument('--threshold', type=float, default=0.9, help='minimum probability of a label')
  return run_command(_run, parser.parse_args(arguments))


if __name__ == '__main__':
  heap.keep_memory()
  sys.exit(main())
