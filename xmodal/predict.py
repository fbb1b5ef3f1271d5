"""Asks a trained model about pictures, or lets it draw one.

  xmodal predict --checkpoint DIR --image F [--text "..."]
  xmodal predict --checkpoint DIR --image FOLDER --text "..." --output answers.jsonl
  xmodal predict --checkpoint DIR --input questions.jsonl --output answers.jsonl

About a folder, or a file of questions, it writes a line of JSON for each picture, as it goes. A
line of questions.jsonl is {"image": "a.jpg", "question": "..."}: a picture by its path from the
file, and what --text would say; "image_id" and "question_id" are taken over, other keys are
ignored. A picture that cannot be read has "error" in its line, and the others are answered.
DIR, F and FOLDER may be addresses in a bucket (gs://BUCKET/FOLDER).
Exit codes: 0; 1 if none of several pictures can be read; 2 for a mistake, which one line names.
"""

import argparse
from collections.abc import Callable
import contextlib
import os
import sys

import jax
from PIL import Image
from tqdm import tqdm

from xmodal import atomic, errors, outputs, paths, predict_many, storage
from xmodal.data.pictures.decoded import DecodedPictures
from xmodal.errors import UserError
from xmodal.predictor import AT_ONCE, PRECISIONS, Predictor
from xmodal.tasks.task import Task
from xmodal.train.process.compilation_cache import enable_compilation_cache

_OPTIONS = ('n', 'guidance', 'steps', 'seed', 'mask', 'strength')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code, see above."""
  parser = argparse.ArgumentParser(prog='xmodal predict', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal train, WORKDIR/best, or one of its '
                      'checkpoints/STEP folders')
  parser.add_argument('--image', metavar='F', help='any picture that Pillow opens, or a folder of '
                      'them (and of folders below); for retrieval a folder is searched for the '
                      'text; for generation one to change, or none')
  parser.add_argument('--input', metavar='F', help='a jsonl file of pictures and questions, in '
                      'place of --image')
  parser.add_argument('--text', default='', help='the question, also of all pictures, or of lines '
                      'without one; for detection, names with a full stop or semicolon after each, '
                      'or what means one thing: "the square left of the cross"; for retrieval, '
                      'texts to be compared, likewise; for generation, what to draw; captioning '
                      'needs none')
  parser.add_argument('--task', help='one of those the model learned; the first by default')
  parser.add_argument('--output', metavar='F', help='also draw the picture and the answer here; '
                      'for several pictures the file of answers, stdout by default')
  parser.add_argument('--precision', default='', choices=PRECISIONS, metavar='P',
                      help=f'of the weights: {", ".join(PRECISIONS)}')
  parser.add_argument('--overwrite', action='store_true',
                      help='replace a file of answers that is there')
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
  for name in ('checkpoint', 'image', 'input', 'mask', 'output'):
    if given := getattr(args, name):
      setattr(args, name, paths.resolved(given, f'--{name}'))
  for name in ('image', 'mask'):
    if (path := getattr(args, name)) is not None and not storage.exists(path):
      raise UserError(f'--{name} {path}: no such file')
  if args.input and args.image:
    raise UserError('wanted one of --image and --input')
  if args.input and not storage.is_file(args.input):
    raise UserError(f'--input {args.input}: no such file')
  # What a folder is to a task is known once the model is loaded.
  is_folder = bool(args.image) and storage.is_dir(args.image)
  if args.input or (is_folder and not _names_picture(args.output)):
    predict_many.check_output(args.output, args.overwrite)
  elif args.output:
    _check_output(args.output)
  enable_compilation_cache()
  opened = DecodedPictures()
  predictor = Predictor(args.checkpoint, opened, args.precision)
  task = predictor.task(args.task or next(iter(predictor.tasks)))
  given = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
  if other := sorted(set(given) - set(task.query_options)):
    raise UserError(f'--{other[0]} means nothing to {task.name}; leave it out')
  if args.input or (is_folder and not task.takes_folders):
    predict_many.check_output(args.output, args.overwrite)
    return predict_many.answer_all(
        predictor, opened, task, folder=args.image, questions=args.input, text=args.text,
        output=args.output, options=given)
  if is_folder and args.output:
    _check_output(args.output)
  return _answer_one(args, predictor, task, given)


def _answer_one(args, predictor, task, given):
  if args.image is None and not task.draws:
    raise UserError(f'--image is missing; {task.name} wants a picture')
  if args.output and type(task).draw is Task.draw:
    raise UserError(f'--output {args.output}: {task.name} draws no picture; leave it out')
  if args.output is None and task.draws:
    raise UserError(f'--output is missing; {task.name} wants a file for what it draws')
  with contextlib.ExitStack() as closing:
    if task.draws and 'progress' in task.query_options:
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
      with outputs.on_this_machine(args.output) as own, atomic.written(own, 'wb') as f:
        task.draw(examples[0], pictures[0], prediction).save(f, kind)
    except UserError:
      raise
    except (OSError, ValueError) as error:
      raise UserError(f'--output {args.output} cannot be written: {error}') from error


def _check_output(path):
  """Raises UserError before the work where a picture could not be written there."""
  outputs.check_folder(path)
  if not _names_picture(path):
    raise UserError(f'--output {path} names no kind of picture; a name ending in .png is wanted')


def _names_picture(path):
  """Whether a path, or None, ends as a picture that Pillow writes."""
  end = os.path.splitext(path or '')[1].lower()
  return Image.registered_extensions().get(end) in Image.SAVE


class _Progress:
  """A bar on a terminal: called with the steps of a picture, returns the callback of each."""

  def __init__(self, pictures: int):
    self._rounds, self._bar = -(-pictures // AT_ONCE), None

  def __enter__(self):
    return self

  def __call__(self, steps: int) -> Callable[..., None] | None:
    if not sys.stderr.isatty():
      return None
    self._bar = tqdm(total=steps * self._rounds, unit='step', dynamic_ncols=True, leave=False)
    return lambda step, picture: self._bar.update(1)

  def __exit__(self, *_):
    if self._bar is not None:
      jax.effects_barrier()
      self._bar.close()


if __name__ == '__main__':
  sys.exit(main())
