"""Seconds and memory until the first batch, from files of a published size and from a pack of them.

`xmodal bench data_size [--source visual_genome] [--workdir DIR]` writes made-up files in
the layout of VQAv2 (ten answers a question) or of Visual Genome (35 objects a picture), with tiny
pictures: what is measured is what a run reads, checks and learns before its first step. Each row is
a process of its own.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from xmodal.bench.data import jpeg
from xmodal.bench.harness import check_positive, run_command
from xmodal.data.pack import pack
from xmodal.errors import UserError

_ANSWERS, _WORDS = 20_000, 6_000
_SIZES = {'vqa_v2': (82_783, 443_757), 'visual_genome': (108_077, 5_408_689)}  # as published
_TASKS = {'vqa_v2': 'vqa', 'visual_genome': 'detection'}
_ROWS = (('JSON', ''), ('pack, first run', 'pack'), ('pack, later run', 'pack'))


def write_questions(folder: str, split: str, questions: int, pictures: int) -> None:
  """Writes one split of VQAv2's layout with made-up content, the same on every run."""
  rng = np.random.default_rng(pictures)
  os.makedirs(os.path.join(folder, f'{split}2014'), exist_ok=True)
  picture = jpeg(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8))
  for i in range(pictures):
    with open(os.path.join(folder, f'{split}2014', f'COCO_{split}2014_{i:012d}.jpg'), 'wb') as f:
      f.write(picture)
  # Few words and answers are frequent, as in real texts.
  words = rng.zipf(1.3, (questions, 6)) % _WORDS
  answers = rng.zipf(1.4, (questions, 3)) % _ANSWERS
  asked, answered = [], []
  for i in range(questions):
    image, number = i % pictures, i * 10 + 1
    asked.append({'image_id': image, 'question_id': number,
                  'question': f'{" ".join(f"w{word}" for word in words[i])}?'})
    people = [f'a{answers[i, k % 3]}' for k in range(10)]
    answered.append({
        'image_id': image, 'question_id': number, 'question_type': 'what', 'answer_type': 'other',
        'multiple_choice_answer': people[0],
        'answers': [{'answer': a, 'answer_confidence': 'yes', 'answer_id': k}
                    for k, a in enumerate(people, 1)]})
  for name, key, rows in ((f'v2_OpenEnded_mscoco_{split}2014_questions', 'questions', asked),
                          (f'v2_mscoco_{split}2014_annotations', 'annotations', answered)):
    with open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8') as f:
      json.dump({key: rows}, f)


def write_regions(folder: str, pictures: int, regions: int, objects: int = 35) -> None:
  """Writes Visual Genome's layout with made-up content, the same on every run.

  Args:
    folder: where to.
    pictures: number of pictures.
    regions: number of regions, over all pictures.
    objects: in each picture.
  """
  rng = np.random.default_rng(pictures)
  os.makedirs(os.path.join(folder, 'VG_100K'), exist_ok=True)
  picture = jpeg(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
  files = [open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8')
           for name in ('image_data', 'region_descriptions', 'objects')]
  with contextlib.ExitStack() as opened:
    for file in files:
      opened.enter_context(file)
    for i in range(pictures):
      with open(os.path.join(folder, 'VG_100K', f'{i + 1}.jpg'), 'wb') as f:
        f.write(picture)
      number = regions * (i + 1) // pictures - regions * i // pictures
      of_regions, of_objects = (_boxes(rng, count) for count in (number, objects))
      phrases = rng.zipf(1.3, (number, 5)) % _WORDS
      names = rng.zipf(1.4, objects) % _ANSWERS
      first = regions * i // pictures
      content = (
          {'image_id': i + 1, 'width': 64, 'height': 64},
          {'id': i + 1, 'regions': [
              {'region_id': first + k, 'image_id': i + 1, 'x': x, 'y': y, 'width': w, 'height': h,
               'phrase': ' '.join(f'w{word}' for word in phrase)}
              for k, ((x, y, w, h), phrase) in enumerate(zip(of_regions, phrases.tolist()))]},
          {'image_id': i + 1, 'objects': [
              {'object_id': i * objects + k, 'x': x, 'y': y, 'w': w, 'h': h, 'names': [f'n{name}'],
               'synsets': [], 'merged_object_ids': []}
              for k, ((x, y, w, h), name) in enumerate(zip(of_objects, names.tolist()))]})
      for file, record in zip(files, content):
        file.write(f'{", " if i else "["}{json.dumps(record)}')
    for file in files:
      file.write(']')


def _boxes(rng, count):
  """Boxes in a picture of 64x64 pixels, as lists of x, y, width and height."""
  return np.concatenate([rng.integers(0, 32, (count, 2)), rng.integers(2, 32, (count, 2))],
                        axis=1).tolist()


def measure(source: str, root: str, task: str = 'vqa') -> None:
  """Prints the seconds until the first batch and this process's peak memory."""
  began = time.perf_counter()
  from xmodal import config
  from xmodal.train.plan import Plan
  c = config.base()
  c.data.source, c.data.root = source, root
  c.mixer.tasks = (task,)
  plan = Plan(c, os.path.join(tempfile.gettempdir(), 'unused'), mode='dry_run')
  plan.stream('train').at(plan.sampling.kinds[0].tasks, plan.sampling, 0, 64)
  print(json.dumps({'seconds': time.perf_counter() - began, 'gb': _peak()}))


def _peak():
  """Peak memory of this process in GiB."""
  try:
    with open('/proc/self/status', encoding='utf-8') as f:
      return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 2**20
  except OSError:  # elsewhere: may be that of the process that started this one
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _run(options):
  check_positive(options, 'regions', 'questions', 'pictures')
  pictures, texts = _SIZES[options.source]
  pictures = options.pictures or pictures
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.workdir or temporary
    os.makedirs(folder, exist_ok=True)
    if not any(name.endswith('.json') for name in os.listdir(folder)):
      if options.source == 'vqa_v2':
        texts = options.questions or texts
        write_questions(folder, 'train', texts, pictures)
        write_questions(folder, 'val', 200, 40)
      else:
        texts = options.regions or texts
        write_regions(folder, pictures, texts)
      print(f'{texts:,} texts, {pictures:,} pictures')
    packed = os.path.join(folder, 'pack')
    environment = {**os.environ, 'XDG_CACHE_HOME': os.path.join(folder, 'cache')}
    for name, place in _ROWS:
      if place and not os.path.exists(os.path.join(packed, pack.TITLE)):
        began = time.perf_counter()
        if code := pack.main([folder, '--source', options.source, '--output', packed]):
          return code
        print(f'packed in {time.perf_counter() - began:.0f} s')
      source = 'pack' if place else options.source
      done = subprocess.run(
          [sys.executable, '-c', 'from xmodal.bench.data_size import measure; measure('
           f'{source!r}, {os.path.join(folder, place)!r}, {_TASKS[options.source]!r})'],
          capture_output=True, text=True, env=environment)
      if done.returncode:
        raise UserError(f'{name}: {done.stderr.strip().splitlines()[-1]}')
      found = json.loads(done.stdout.splitlines()[-1])
      print(f'{name:16} {found["seconds"]:7.1f} s {found["gb"]:6.2f} GB', flush=True)
  return 0


def main(arguments: list[str] | None = None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--source', default='vqa_v2', choices=_SIZES)
  parser.add_argument('--questions', type=int, help="default: VQAv2's 443,757")
  parser.add_argument('--regions', type=int, help="default: Visual Genome's 5,408,689")
  parser.add_argument('--pictures', type=int, help='default: 82,783 and 108,077')
  parser.add_argument('--workdir', default='', help='keeps the files; default: a temporary folder')
  return run_command(_run, parser.parse_args(arguments))


if __name__ == '__main__':
  sys.exit(main())
