"""Examples per second of evaluation, compared with training on the same data.

`xmodal bench evaluation [--config vqa] [--questions 100000] [--devices 8] [KEY=VALUE
...]` writes questions on small pictures to a jsonl file, trains on them for some steps, and
evaluates on all of them: prediction, decoding, scoring, and writing of predictions. Compilation is
not counted. --devices is the number of CPU devices; accelerators are used as found.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from xmodal.bench.harness import changed, check_positive, read_config, run_command


def write_questions(folder: str, split: str, count: int, pictures: int = 500) -> None:
  """Writes `count` questions with ten answers each, of ten types, about small PNG files."""
  rng = np.random.default_rng(0)
  for i in range(pictures):
    path = os.path.join(folder, f'{i}.png')
    if not os.path.exists(path):
      Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  with open(os.path.join(folder, f'{split}.jsonl'), 'w', encoding='utf-8') as f:
    for i in range(count):
      thing = rng.integers(100)
      f.write(json.dumps({
          'image': f'{i % pictures}.png', 'question': f'what is on the {i % 1000}th shelf?',
          'answers': [f'thing {thing}'] * 7 + [f'a thing like {thing}'] * 3,
          'question_type': f'type {i % 10}'}) + '\n')


def _training_rate(plan, state, steps):
  """(last state, examples per second of the second half of the steps)."""
  import jax

  from xmodal.sharding import mesh as meshes
  from xmodal.train.programs import compile_step
  from xmodal.train.steps.prefetch import Prefetch
  size = plan.config.train.batch_size
  step, half = compile_step(plan), steps // 2
  batches = Prefetch(lambda: plan.stream('train').batches(
      plan.sampling, size, 0, steps, meshes.local_rows(plan.mesh, size)), plan.mesh, size)
  for number in range(steps):
    if number == half:
      jax.block_until_ready(state)
      began = time.perf_counter()
    state, _ = step(state, batches.next())
  jax.block_until_ready(state)
  seconds = time.perf_counter() - began
  batches.close()
  return state, (steps - half) * size / seconds


def _run(options):
  import jax

  from xmodal.main import give_threads
  from xmodal.train import scoring
  from xmodal.train.plan import Plan
  from xmodal.train.steps import state as states
  check_positive(options, 'questions', 'devices', 'steps')
  jax.config.update('jax_num_cpu_devices', options.devices)
  with tempfile.TemporaryDirectory() as folder:
    for split in ('train', 'val'):
      write_questions(folder, split, options.questions)
    config = read_config(options.config)
    config.data.source, config.data.root = 'jsonl', folder
    config.mixer.tasks, config.mixer.weights = ('vqa',), (1.0,)
    config = changed(config, options.changes)
    give_threads(split=(config.mesh.fsdp, config.mesh.tensor) != (1, 1))
    plan = Plan(config, os.path.join(folder, 'run'))
    state, training = _training_rate(plan, states.create(plan.init, plan.abstract), options.steps)

    one = plan.evaluation
    make = one.maker()
    scoring.predict_all(one.predict_step, state.variables, make, one.batch_size, plan.mesh,
                         most=one.batch_size)
    os.makedirs(plan.workdir, exist_ok=True)
    began = time.perf_counter()
    scores = one.run(state.variables, options.steps, plan.workdir)
    seconds = time.perf_counter() - began
  found = scores['vqa']['examples']
  print(f'{jax.device_count()} devices ({jax.devices()[0].device_kind}), batch '
        f'{plan.config.train.batch_size}')
  print(f'training   {training:10.1f} examples/s')
  print(f'evaluation {found / seconds:10.1f} examples/s of {found} in {seconds:.1f} s, '
        f'{found / seconds / training:.2f} of training')


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench evaluation', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='vqa')
  parser.add_argument('--questions', type=int, default=100_000)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--steps', type=int, default=40, help='training steps')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
