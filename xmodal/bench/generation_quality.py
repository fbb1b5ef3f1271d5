"""Quality of generated pictures: do they show their text, look real, or copy training pictures?

`xmodal bench generation_quality --checkpoint DIR [--n 300] [--train 20000] [--steps N]
[--guidance G ...] [--seed 0]` draws a picture for each of n held-out captions.

Rows:
  model, guidance G    the model, once for each guidance
  model without text   the unconditional baseline
  nearest caption      the training picture whose caption has the most words in common
  real pictures        the captions' own pictures: the best possible score
Columns:
  right                share of pictures that show what the caption says (embedded scenes only)
  Frechet              distance to n other held-out pictures, by the features of
                       xmodal.metrics.frechet; not comparable with FID
  nearest, lowest 1%   distance to the nearest of --train training pictures (root mean square over
                       pixels, 0..255): median and 1st percentile; far below the last row, the
                       model copies
"""

import argparse
from collections.abc import Sequence
import dataclasses
import sys

import numpy as np

from xmodal.bench.harness import check_positive, run_command
from xmodal.data.example import Example
from xmodal.data.open import open_source
from xmodal.data.scenes import judge
from xmodal.data.scenes.drawings import parse
from xmodal.errors import UserError
from xmodal.metrics import frechet
from xmodal.mixer.feed import task_config
from xmodal.predictor import AT_ONCE, Predictor


def pictures_of(predictor: Predictor, examples: Sequence[Example]) -> np.ndarray:
  """The examples' pictures as the model's input: uint8 [N, H, W, 3]."""
  task = predictor.task('generation')
  return np.concatenate([
      predictor.batch(list(examples[start:start + AT_ONCE]), {task.name: task})['image']
      for start in range(0, len(examples), AT_ONCE)])


def drawn(predictor: Predictor, captions: Sequence[str], seed: int, *,
          guidance: float | None = None, steps: int | None = None) -> np.ndarray:
  """Generates a picture for each caption ('': unconditional), each from its own noise."""
  task = predictor.task('generation').with_sampling(guidance=guidance, steps=steps)
  side = predictor.config.data.image_size
  blank = np.zeros((side, side, 3), np.uint8)
  examples = [Example(blank, image_id=f'{seed}/{number}', captions=(text,) if text else ())
              for number, text in enumerate(captions)]
  return np.stack([p.image for p in predictor(examples, task)[1]])


def nearest_captions(captions: Sequence[str], known: Sequence[str]) -> list[int]:
  """For each caption, the index of the known one with the highest Jaccard similarity of words."""
  words = [set(text.lower().split()) for text in known]

  def shared(text):
    own = set(text.lower().split())
    return max(range(len(words)), key=lambda i: len(own & words[i]) / max(len(own | words[i]), 1))

  return [shared(text) for text in captions]


def nearest_distances(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Distance of each picture to the nearest other: root mean square over pixels, 0..255."""
  flat, known = (x.reshape(len(x), -1).astype(np.float32) for x in (pictures, others))
  # The argmin needs no squares of `flat`; the distance is recomputed against rounding errors.
  best = ((known ** 2).sum(1) - 2 * flat @ known.T).argmin(1)
  return np.sqrt(np.square(flat - known[best]).mean(1))


def right_share(pictures: np.ndarray, captions: Sequence[str]) -> float | None:
  """Share of pictures that show their caption; None if the judge cannot parse a caption."""
  wanted = list(map(parse, captions))
  if not all(wanted):
    return None
  return float(np.mean([not judge.fault(*pair) for pair in zip(pictures, wanted)]))


def measure(predictor: Predictor, *, count: int, train: int, seed: int,
            guidances: Sequence[float] = (), steps: int | None = None) -> dict[str, dict]:
  """The table: {row: {'right', 'frechet', 'nearest', 'nearest_1%'}}.

  Args:
    predictor: Predictor of a checkpoint with the generation task.
    count: number of captions, and of the other held-out pictures.
    train: number of training pictures.
    seed: seed of the noise.
    guidances: one row each; if empty, the config's guidance.
    steps: sampling steps; None: the config's.

  Raises:
    UserError: the task is missing, or the data has too few captions.
  """
  task = predictor.task('generation')
  config = task_config(predictor.config, task.name)
  if config.data.source == 'shapes':
    config.data.eval_examples = max(config.data.eval_examples, 2 * count)
  held_out = _captioned(open_source(config, config.data.eval_split, train=False), 2 * count)
  known = _captioned(open_source(config, config.data.train_split, train=True), train)
  if len(held_out) < 2 * count:
    raise UserError(f'--n={count}: wanted captions of {2 * count} pictures of '
                    f'{config.data.eval_split!r}, found {len(held_out)}; lower it')
  captions = [e.captions[0] for e in held_out[:count]]
  real, others = np.split(pictures_of(predictor, held_out), [count])
  trained_on = pictures_of(predictor, known)
  by_caption = nearest_captions(captions, [e.captions[0] for e in known])
  guidances = guidances or [config.generation.guidance]
  rows = {
      **{f'model, guidance {g:g}': drawn(predictor, captions, seed, guidance=g, steps=steps)
         for g in guidances},
      'model without text': drawn(predictor, [''] * count, seed, guidance=1.0, steps=steps),
      'nearest caption': trained_on[by_caption], 'real pictures': real}
  return {name: {
      'right': right_share(pictures, captions),
      'frechet': frechet.frechet_distance(pictures, others),
      **_nearest(pictures, trained_on)} for name, pictures in rows.items()}


def _nearest(pictures, trained_on):
  distances = nearest_distances(pictures, trained_on)
  return {'nearest': float(np.median(distances)), 'nearest_1%': float(np.quantile(distances, 0.01))}


def _captioned(source, count):
  found = []
  for number in range(len(source)):
    if len(found) == count:
      break
    example = source[number]
    if example.captions:
      found.append(dataclasses.replace(example, captions=example.captions[:1]))
  return found


def table(rows: dict[str, dict]) -> str:
  """Formats the result of measure for the terminal."""
  lines = [f'{"":<22}{"right":>8}{"Frechet":>10}{"nearest":>10}{"lowest 1%":>11}']
  for name, row in rows.items():
    right = '' if row['right'] is None else format(row['right'], '.1%')
    lines.append(f'{name:<22}{right:>8}{row["frechet"]:>10.4f}{row["nearest"]:>10.1f}'
                 f'{row["nearest_1%"]:>11.1f}')
  return '\n'.join([*lines, f'Frechet distance of {frechet.EXTRACTOR}; that of real pictures is '
                    'the lower bound'])


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR')
  parser.add_argument('--n', type=int, default=300, help='captions')
  parser.add_argument('--train', type=int, default=20_000,
                      help='training pictures to search for copies')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--guidance', type=float, nargs='+', default=[])
  parser.add_argument('--steps', type=int)
  return run_command(_run, parser.parse_args(arguments))


def _run(options):
  check_positive(options, 'train', 'steps')
  if options.n < 2:  # one picture has no covariance
    raise UserError(f'--n={options.n}: wanted 2 or more')
  for guidance in options.guidance:
    if not 0 <= guidance < np.inf:
      raise UserError(f'--guidance={guidance:g}: wanted 0 or more')
  print(table(measure(Predictor(options.checkpoint), count=options.n, train=options.train,
                      seed=options.seed, guidances=options.guidance, steps=options.steps)))


if __name__ == '__main__':
  sys.exit(main())
