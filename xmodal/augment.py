"""Labels pictures that nobody labelled: writes what a trained model says of them and is sure of.

  python -m xmodal.augment --checkpoint DIR --images FOLDER --questions FILE --output OUT

OUT/train.jsonl holds captions, and questions with answers, as people's examples are written
(xmodal/data/jsonl.py), with "made": true and "made_by" (the checkpoint, and the probabilities of answer
and caption); pictures are named by their paths from OUT.
--config.data.more="('OUT',)" trains on them beside people's.

An answer is kept if its probability reaches the threshold and the caption that the model writes of
the same picture agrees with it (xmodal/metrics/agreement.py). Where the words cannot tell, the answer
is left out, or kept with --keep_unjudged. A caption is kept if its probability a token (the geometric
mean: the product says above all how long a text is) reaches the threshold.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from xmodal.data import images
from xmodal.data.example import Example
from xmodal.data.jsonl import numbered_lines
from xmodal.errors import UserError
from xmodal.metrics.agreement import agrees
from xmodal.predict import AT_ONCE, Predictor
from xmodal.train import checkpoint
from xmodal.train.cache import enable_compilation_cache

_LISTED = 20  # answers, of those given most often


class Opened:
  """Pictures that are opened once, in threads, for all that is asked of them: what a Predictor decodes
  by."""

  def __init__(self):
    self._pictures: dict[str, images.Decoded] = {}

  def open(self, paths: Sequence[str], size: int) -> dict[str, str]:
    """Opens these in place of those before, for a model's input of size x size pixels.

    Returns what is wrong with those that cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:  # decoders run outside the GIL
      found = dict(zip(paths, pool.map(lambda path: _decode(path, (size, size)), paths)))
    self._pictures = {path: it for path, it in found.items() if not isinstance(it, str)}
    return {path: it for path, it in found.items() if isinstance(it, str)}

  def __call__(self, source: str | np.ndarray, size: tuple[int, int]) -> images.Decoded:
    known = self._pictures.get(source) if isinstance(source, str) else None
    return known or images.decode(source, size)


@dataclasses.dataclass
class Tally:
  """What there is to report.

  Attributes:
    pictures: those that could be read.
    unreadable: what is wrong with each of the others.
    captions: number kept.
    verdicts: of the answers that are sure: whether the caption agrees, or None.
    given, sure, kept: how often each answer was given, was sure, and is in the file.
    examples: lines of the file.
  """

  pictures: int = 0
  unreadable: list[str] = dataclasses.field(default_factory=list)
  captions: int = 0
  verdicts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  given: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  sure: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kept: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  examples: int = 0


class Labeller:
  """Asks a model about pictures and keeps what it is sure of."""

  def __init__(self, predictor: Predictor, opened: Opened, questions: Sequence[str], *,
               per_picture: int | None, threshold: float, keep_unjudged: bool):
    """A labeller with an empty tally.

    Args:
      predictor: of a model with the task vqa if there are questions; it decodes by `opened`.
      opened: what pictures are opened with.
      questions: to be asked; () for captions alone.
      per_picture: how many of them of each picture, drawn at random; None: all.
      threshold: least probability, 0..1.
      keep_unjudged: whether answers are kept that the caption says nothing of.
    """
    self.tally = Tally()
    self._predictor, self._opened, self._questions = predictor, opened, tuple(questions)
    self._per_picture = min(per_picture or len(questions), len(questions))
    self._threshold, self._keep_unjudged = threshold, keep_unjudged

  def lines(self, paths: Sequence[str]) -> list[dict]:
    """Examples of some pictures, as jsonl has them but for "image": the picture's path."""
    wrong = self._opened.open(paths, self._predictor.config.data.image_size)
    self.tally.unreadable += wrong.values()
    paths = [path for path in paths if path not in wrong]
    self.tally.pictures += len(paths)
    captions = self._captions(paths)
    lines = collections.defaultdict(list)
    for path, answer in self._answers(paths, captions):
      lines[path].append(answer)
    examples = []
    for path in paths:
      known, probability = captions[path]
      known = {'caption': known} if known and probability >= self._threshold else {}
      self.tally.captions += len(known)
      for line in lines[path] or ([{}] if known else []):
        made_by = line.pop('made_by', {}) | ({'caption': round(probability, 4)} if known else {})
        examples.append({'image': path, **line, **known, 'made': True, 'made_by': made_by})
    self.tally.examples += len(examples)
    return examples

  def _captions(self, paths) -> dict[str, tuple[str, float]]:
    """(caption, probability a token) of each picture; ('', 0) where the model writes none."""
    if 'captioning' not in self._predictor.tasks:
      return dict.fromkeys(paths, ('', 0.0))
    predictions = self._predict([Example(path) for path in paths], 'captioning')
    lengths = self._predictor.tokenizer.lengths([p.caption for p in predictions])
    return {path: (p.caption.strip(), p.probability ** (1 / length))
            for path, p, length in zip(paths, predictions, lengths.tolist())}

  def _answers(self, paths, captions) -> Iterator[tuple[str, dict]]:
    """The questions and answers that are kept, each with its picture."""
    asked = [Example(path, question=question) for path in paths for question in self._ask(path)]
    for example, prediction in zip(asked, self._predict(asked, 'vqa')):
      answer = prediction.answer.strip()
      self.tally.given[answer] += 1
      if not answer or prediction.probability < self._threshold:
        continue
      self.tally.sure[answer] += 1
      verdict = agrees(example.question, answer, captions[example.image][0])
      self.tally.verdicts[verdict] += 1
      if verdict or (verdict is None and self._keep_unjudged):
        self.tally.kept[answer] += 1
        yield example.image, {'question': example.question, 'answers': [answer],
                              'made_by': {'answer': round(prediction.probability, 4)}}

  def _ask(self, path):
    """The questions for a picture: the same whenever it is asked."""
    return random.Random(os.path.basename(path)).sample(self._questions, self._per_picture)

  def _predict(self, examples, task):
    """Predictions in batches of one size, so that one program serves them all."""
    if not examples:
      return []
    fillers = [examples[-1]] * (-len(examples) % AT_ONCE)
    return self._predictor([*examples, *fillers], task)[1][:len(examples)]


def _decode(path, size):
  """A picture, or what is wrong with it."""
  try:
    path.encode('utf-8')
    return images.decode(path, size)
  except UserError as error:
    return str(error)
  except UnicodeEncodeError:
    return f'{path!a}: the name is not UTF-8, so that no .jsonl can hold it'


def find_pictures(folder: str) -> list[str]:
  """The paths of all files in a folder, and in those below, that are named as pictures, sorted."""
  if not os.path.isdir(folder):
    raise UserError(f'--images {folder}: no such folder')
  known = Image.registered_extensions()
  paths = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names
                 if os.path.splitext(name)[1].lower() in known)
  if not paths:
    raise UserError(f'--images {folder}: no pictures in that folder; wanted some in a format that '
                    'Pillow opens, such as .jpg or .png')
  return paths


def read_questions(path: str) -> list[str]:
  """The different questions of a file, in its order: one a line, or those of a .jsonl of examples."""
  if not os.path.isfile(path):
    raise UserError(f'--questions {path}: no such file')
  questions = {}
  for number, line in numbered_lines(path):
    try:
      question = line.decode('utf-8')
      if path.endswith('.jsonl'):
        question = json.loads(question).get('question') or ''
      questions[question.strip()] = None
    except (ValueError, AttributeError) as error:
      raise UserError(f'--questions {path}:{number}: {error}; wanted a question a line in UTF-8, or '
                      'a .jsonl of examples') from error
  questions.pop('', None)
  if not questions:
    raise UserError(f'--questions {path}: no questions in it; wanted one a line, or a .jsonl of '
                    'examples that have "question"')
  return list(questions)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a mistake of the user's)."""
  parser = argparse.ArgumentParser(prog='python -m xmodal.augment', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal.main, or one of its checkpoints/STEP folders')
  parser.add_argument('--images', required=True, metavar='FOLDER', help='pictures, also in folders below')
  parser.add_argument('--output', required=True, metavar='OUT', help='a folder that is new or empty')
  parser.add_argument('--questions', metavar='FILE', help='one a line; or a .jsonl of examples, such '
                      'as the train.jsonl that the model learned from, whose questions are taken')
  parser.add_argument('--per_picture', type=int, metavar='N',
                      help='questions of each picture, drawn at random; all if not given')
  parser.add_argument('--captions', action='store_true', help='write captions and ask no questions')
  parser.add_argument('--threshold', type=float, default=0.9, metavar='P',
                      help='least probability of what is kept; 0.9 if not given')
  parser.add_argument('--keep_unjudged', action='store_true', help='keep answers that are sure though '
                      'the caption says nothing of them, or there is none')
  parser.add_argument('--limit', type=int, metavar='N', help='only the first N pictures')
  args = parser.parse_args(argv)
  try:
    _augment(args)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except OSError as error:  # a full disk, a folder that may not be written to
    print(f'error: {error.filename or args.output}: {error.strerror or error}', file=sys.stderr)
    return 2
  return 0


def _augment(args):
  _check(args)
  paths = find_pictures(args.images)[:args.limit]
  questions = () if args.captions else read_questions(args.questions)
  step = checkpoint.find(args.checkpoint)
  enable_compilation_cache()
  opened = Opened()
  predictor = Predictor(step, opened)
  _check_tasks(predictor, step, args)
  for question in questions:
    for note in predictor.tasks['vqa'].notes(Example('', question=question)):
      print(f'note: {question}: {note}', file=sys.stderr)
  labeller = Labeller(predictor, opened, questions, per_picture=args.per_picture,
                      threshold=args.threshold, keep_unjudged=args.keep_unjudged)
  os.makedirs(args.output, exist_ok=True)
  path = os.path.join(args.output, 'train.jsonl')
  with open(f'{path}.part', 'w', encoding='utf-8') as file:
    for line in _label_all(labeller, paths):
      line |= {'image': _path_from(args.output, line['image']),
               'made_by': {'checkpoint': step, **line['made_by']}}
      file.write(json.dumps(line, ensure_ascii=False) + '\n')
  print('\n'.join(report(labeller.tally, args.threshold, path)))
  if not labeller.tally.examples:
    os.remove(f'{path}.part')
    raise UserError(f'nothing was kept: lower --threshold {args.threshold}, ask what captions tell of, '
                    'or train the model for longer')
  os.replace(f'{path}.part', path)


def _path_from(folder, path):
  # '..' leads out of the folder that a link means, not out of the link's.
  place, name = os.path.split(path)
  return os.path.join(os.path.relpath(os.path.realpath(place), os.path.realpath(folder)), name)


def _check(args):
  """Raises UserError at the first argument that cannot be used."""
  if not 0 <= args.threshold <= 1:
    raise UserError(f'--threshold {args.threshold}: wanted 0 to 1')
  for name in ('limit', 'per_picture'):
    if (number := getattr(args, name)) is not None and number < 1:
      raise UserError(f'--{name} {number}: wanted 1 or more')
  if bool(args.questions) == args.captions:
    raise UserError('wanted one of --questions FILE, for questions with answers and captions, and '
                    '--captions, for captions alone')
  if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
    raise UserError(f'--output {args.output} is there and not an empty folder; give another, or '
                    'delete it')


def _check_tasks(predictor, step, args):
  """Raises UserError if the model did not learn what it is to do."""
  learned = f'{step} was trained on {", ".join(predictor.tasks)}'
  if args.questions and 'vqa' not in predictor.tasks:
    raise UserError(f'{learned}, and answers no questions; wanted vqa among the tasks, or --captions')
  if 'captioning' in predictor.tasks:
    return
  if args.captions:
    raise UserError(f'{learned}, and writes no captions; wanted captioning among the tasks')
  if not args.keep_unjudged:
    raise UserError(f'{learned}, and writes no captions that could agree with its answers; wanted '
                    'captioning among the tasks, or --keep_unjudged')


def _label_all(labeller, paths):
  """Yields the examples of all pictures, and says how it goes."""
  every, told = max(len(paths) // 10, 1), 0
  with tqdm(total=len(paths), unit='picture', dynamic_ncols=True,
            disable=not sys.stderr.isatty()) as bar:
    for start in range(0, len(paths), AT_ONCE):
      some = paths[start:start + AT_ONCE]
      known = len(labeller.tally.unreadable)
      yield from labeller.lines(some)
      for reason in labeller.tally.unreadable[known:]:
        tqdm.write(f'left out: {reason}', file=sys.stderr)
      done = start + len(some)
      bar.update(len(some))
      bar.set_postfix_str(f'{labeller.tally.examples:,} examples')
      if bar.disable and done // every > told:
        told = done // every
        print(f'{done:,} of {len(paths):,} pictures, {labeller.tally.examples:,} examples', flush=True)


def report(tally: Tally, threshold: float, path: str) -> list[str]:
  """What was asked, what was kept and why, and how often each answer was: lines for the terminal."""
  verdicts, answered = tally.verdicts, tally.given.total()
  rows = [('pictures', tally.pictures,
           f'{len(tally.unreadable):,} more cannot be read' if tally.unreadable else ''),
          ('captions kept', tally.captions, f'probability a token {threshold} or more')]
  if answered:
    judged = (f'of those the caption agrees with {verdicts[True]:,}, contradicts '
              f'{verdicts[False]:,} and says nothing of {verdicts[None]:,}')
    rows += [('questions asked', answered, ''),
             ('answers sure', tally.sure.total(), f'probability {threshold} or more'),
             ('answers kept', tally.kept.total(), judged)]
  rows.append(('examples', tally.examples, f'in {path}' if tally.examples else ''))
  lines = [f'{name:<16}{number:>9,}  {note}'.rstrip() for name, number, note in rows]
  if answered:
    lines += ['', f'{"answer":<24}{"given":>9}{"sure":>9}{"kept":>9}']
    lines += [f'{answer[:23]:<24}{number:>9,}{tally.sure[answer]:>9,}{tally.kept[answer]:>9,}'
              for answer, number in tally.given.most_common(_LISTED)]
    if (others := len(tally.given) - _LISTED) > 0:
      lines.append(f'and {others:,} answers more')
  return lines


if __name__ == '__main__':
  sys.exit(main())
