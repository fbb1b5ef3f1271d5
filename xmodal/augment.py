"""Labels pictures with a trained model, and keeps the labels of which it is confident.

  xmodal augment --checkpoint DIR --images FOLDER --questions FILE --output OUT

OUT/train.jsonl holds captions, and questions with answers, as people's examples are written
(xmodal/data/sources/jsonl.py), with "made": true and "made_by": the checkpoint, and the
probabilities of answer and caption. Pictures are named by their paths from OUT; none is copied. A
run trains on it beside people's examples with --config.data.more=OUT.

An answer is kept if its probability reaches the threshold and the caption that the model writes of
the same picture agrees with it (xmodal/metrics/agreement.py). Where the words cannot tell, it is
left out, or kept with --keep_unjudged. A caption is kept if its probability a token (the geometric
mean: the product says above all how long a text is) reaches the threshold.
"""

import argparse
from collections.abc import Sequence
import json
import os
import sys

from tqdm import tqdm

from xmodal import atomic, errors, paths
from xmodal.data import fields
from xmodal.data.example import Example
from xmodal.data.sources.find_pictures import find_pictures
from xmodal.data.sources.jsonl import numbered_lines
from xmodal.errors import UserError
from xmodal.labeller import DecodedPictures, Labeller, Tally
from xmodal.predictor import AT_ONCE, Predictor
from xmodal.train.checkpoints import checkpoint
from xmodal.train.process.compilation_cache import enable_compilation_cache

_LISTED = 20  # answers, of those given most often


def read_questions(path: str) -> list[str]:
  """The different questions of a file: its lines, or those of a .jsonl of examples."""
  if not os.path.isfile(path):
    raise UserError(f'--questions {path}: no such file')
  questions = {}
  for number, line in numbered_lines(path):
    try:
      question = line.decode('utf-8')
      if path.endswith('.jsonl'):
        question = json.loads(question).get('question') or ''
      questions[fields.trimmed(question)] = None
    except fields.Complaint as error:
      raise UserError(f'--questions {path}:{number}: the question {error}') from None
    except (ValueError, AttributeError, RecursionError) as error:
      raise UserError(f'--questions {path}:{number}: {error}; wanted a question a line in UTF-8, '
                      'or a .jsonl of examples') from error
  questions.pop('', None)
  if not questions:
    raise UserError(f'--questions {path}: no questions in it; wanted one a line, or a .jsonl of '
                    'examples that have "question"')
  return list(questions)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a mistake of the user's)."""
  parser = argparse.ArgumentParser(prog='xmodal augment', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir of xmodal train, or one of its checkpoints/STEP folders')
  parser.add_argument('--images', required=True, metavar='FOLDER',
                      help='of pictures, also in folders below')
  parser.add_argument('--output', required=True, metavar='OUT',
                      help='a folder that is new or empty')
  parser.add_argument('--questions', metavar='FILE', help='one a line; or a .jsonl of examples, '
                      'such as the train.jsonl of labelled data, whose questions are taken')
  parser.add_argument('--per_picture', type=int, metavar='N',
                      help='questions of each picture, drawn at random; all if not given')
  parser.add_argument('--captions', action='store_true', help='write captions and ask no questions')
  parser.add_argument('--threshold', type=float, default=0.9, metavar='P',
                      help='least probability of what is kept; 0.9 if not given')
  parser.add_argument('--keep_unjudged', action='store_true', help='keep answers that are sure '
                      'though the caption says nothing of them, or there is none')
  parser.add_argument('--limit', type=int, metavar='N', help='only the first N pictures')
  args = parser.parse_args(argv)
  return errors.command(lambda: _augment(args), args.output)


def _augment(args):
  for name in ('checkpoint', 'images', 'output', 'questions'):
    if given := getattr(args, name):
      resolve = paths.resolved if name == 'checkpoint' else paths.local
      setattr(args, name, resolve(given, f'--{name}'))
  _check(args)
  pictures = find_pictures(args.images, '--images')[:args.limit]
  questions = () if args.captions else read_questions(args.questions)
  step = checkpoint.find(args.checkpoint)
  enable_compilation_cache()
  opened = DecodedPictures()
  predictor = Predictor(step, opened)
  _check_tasks(predictor, step, args)
  for question in questions:
    for note in predictor.tasks['vqa'].notes(Example('', question=question)):
      print(f'note: {question}: {note}', file=sys.stderr)
  labeller = Labeller(predictor, opened, questions, per_picture=args.per_picture,
                      threshold=args.threshold, keep_unjudged=args.keep_unjudged)
  os.makedirs(args.output, exist_ok=True)
  path = os.path.join(args.output, 'train.jsonl')
  with atomic.written(path) as file:
    for line in _label_all(labeller, pictures):
      line |= {'image': _path_from(args.output, line['image']),
               'made_by': {'checkpoint': step, **line['made_by']}}
      file.write(json.dumps(line, ensure_ascii=False) + '\n')
  if not labeller.tally.examples:
    os.remove(path)
  print('\n'.join(report(labeller.tally, args.threshold, path)))
  if not labeller.tally.examples:
    ways = ['train the model for longer']
    if labeller.tally.verdicts[None] and not args.keep_unjudged:
      ways = ['ask what captions tell of', 'take --keep_unjudged', *ways]
    if args.threshold > 0:
      ways = [f'lower --threshold {args.threshold}', *ways]
    raise UserError(f'nothing was kept: {", or ".join(ways)}')


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
    raise UserError(f'{learned}, and answers no questions; wanted vqa among the tasks, or '
                    '--captions')
  if 'captioning' in predictor.tasks:
    return
  if args.captions:
    raise UserError(f'{learned}, and writes no captions; wanted captioning among the tasks')
  if not args.keep_unjudged:
    raise UserError(f'{learned}, and writes no captions that could agree with its answers; wanted '
                    'captioning among the tasks, or --keep_unjudged')


def _label_all(labeller: Labeller, paths: Sequence[str]):
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
        print(f'{done:,} of {len(paths):,} pictures, {labeller.tally.examples:,} examples',
              flush=True)


def report(tally: Tally, threshold: float, path: str) -> list[str]:
  """The numbers of questions, of kept labels by reason, and of each answer, line by line."""
  verdicts, answered = tally.verdicts, tally.given.total()
  rows = [('pictures', tally.pictures,
           f'{len(tally.unreadable):,} more cannot be read' if tally.unreadable else ''),
          ('captions kept', tally.captions, f'not empty, probability a token {threshold} or more')]
  if answered:
    judged = (f'the caption agrees with {verdicts[True]:,}, contradicts {verdicts[False]:,} and '
              f'says nothing of {verdicts[None]:,}')
    rows += [('questions asked', answered, ''),
             ('answers sure', tally.sure.total(), f'probability {threshold} or more; {judged}'),
             ('answers kept', tally.kept.total(), '')]
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
