"""Seconds and memory until the first batch, from files of VQAv2's size and from a pack of them.

`python -m xmodal.bench.data_size [--questions 443757] [--pictures 82783] [--workdir DIR]` writes
made-up questions, ten answers each, in VQAv2's layout, with tiny pictures: what is measured is what
a run reads, checks and learns before its first step. Each row is a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from xmodal.bench.compare import check_positive, run_command
from xmodal.bench.data import jpeg
from xmodal.data.pack import pack
from xmodal.errors import UserError

_ANSWERS, _WORDS = 20_000, 6_000
_ROWS = (('JSON', 'vqa_v2', ''), ('pack, first run', 'pack', 'pack'),
         ('pack, later run', 'pack', 'pack'))


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


def measure(source: str, root: str) -> None:
  """Prints the seconds until the first batch and this process's peak memory."""
  began = time.perf_counter()
  from xmodal import config
  from xmodal.train.plan import Plan
  c = config.base()
  c.data.source, c.data.root = source, root
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
  check_positive(options, 'questions', 'pictures')
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.workdir or temporary
    if not os.path.exists(os.path.join(folder, 'train2014')):
      write_questions(folder, 'train', options.questions, options.pictures)
      write_questions(folder, 'val', 200, 40)
    packed = os.path.join(folder, 'pack')
    if not os.path.exists(os.path.join(packed, pack.TITLE)):
      began = time.perf_counter()
      if code := pack.main([folder, '--source', 'vqa_v2', '--output', packed]):
        return code
      print(f'packed in {time.perf_counter() - began:.0f} s')
    print(f'{options.questions:,} questions, {options.pictures:,} pictures')
    environment = {**os.environ, 'XDG_CACHE_HOME': os.path.join(folder, 'cache')}
    for name, source, place in _ROWS:
      done = subprocess.run(
          [sys.executable, '-c', f'from xmodal.bench.data_size import measure; '
           f'measure({source!r}, {os.path.join(folder, place)!r})'],
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
  parser.add_argument('--questions', type=int, default=443_757)
  parser.add_argument('--pictures', type=int, default=82_783)
  parser.add_argument('--workdir', default='', help='keeps the files; default: a temporary folder')
  return run_command(_run, parser.parse_args(arguments))


if __name__ == '__main__':
  sys.exit(main())
