"""How long training waits for input, with pictures from files and from a pack.

`xmodal bench input_wait [--size base] [--batch 256] [--steps 200] [KEY=VALUE ...]` makes
photo-like 640x480 JPEGs with a question each, packs them, and trains `vqa` at 224 pixels on the
files and on the pack with `python -m xmodal.main`. It prints examples/s and the share of time in
which the loop waited for input, from the second half of the steps.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from xmodal.bench.harness import check_positive, run_command
from xmodal.errors import UserError


def _write_data(folder, count):
  from xmodal.bench.data import write_pictures
  lines = [json.dumps({'image': os.path.basename(path), 'question': f'what is in picture {i}?',
                       'answers': [f'thing {i % 100}']})
           for i, path in enumerate(write_pictures(folder, count, 480, 640))]
  for split, part in (('train', lines), ('val', lines[:64])):
    with open(os.path.join(folder, f'{split}.jsonl'), 'w', encoding='utf-8') as f:
      f.write('\n'.join(part))


def _train(source, root, workdir, options):
  """Trains until the last step is logged; returns (examples/s, share of waiting)."""
  never = 10**6
  command = [
      sys.executable, '-m', 'xmodal.main', '--config', 'vqa', '--workdir', workdir,
      f'--config.data.source={source}', f'--config.data.root={root}',
      "--config.mixer.tasks=('vqa',)", '--config.mixer.weights=(1.0,)',
      '--config.data.image_size=224', f'--config.model.size={options.size}',
      f'--config.train.batch_size={options.batch}', f'--config.train.steps={never}',
      '--config.optimizer.learning_rate=1e-4', '--config.train.log_every=10',
      '--config.data.memory_mb=0',  # decoded pictures are not kept: a larger set would not fit
      f'--config.train.eval_every={never}', f'--config.train.checkpoint_every={never}',
      *(f'--config.{change.removeprefix("config.")}' for change in options.changes)]
  log, path = f'{workdir}.log', os.path.join(workdir, 'metrics.jsonl')
  with open(log, 'w', encoding='utf-8') as output:
    run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
  try:
    lines = []
    while not lines or lines[-1]['step'] < options.steps:
      if run.poll() is not None:
        with open(log, encoding='utf-8') as f:
          raise UserError(f'{" ".join(command)} ended with code {run.returncode}: '
                          f'{f.read()[-500:]}')
      time.sleep(0.5)
      if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
          lines = [line for line in map(json.loads, f) if 'input_wait' in line]
  finally:
    run.send_signal(signal.SIGKILL)  # the run is not wanted, and saving it takes long
    run.wait()
  late = [line for line in lines if line['step'] > options.steps // 2]
  return (statistics.median(line['examples_per_second'] for line in late),
          statistics.mean(line['input_wait'] for line in late))


def _run(options):
  from xmodal.data.pack import pack as packing
  check_positive(options, 'batch', 'steps', 'pictures')
  with tempfile.TemporaryDirectory() as folder:
    files, pack = os.path.join(folder, 'files'), os.path.join(folder, 'pack')
    os.mkdir(files)
    _write_data(files, options.pictures)
    with contextlib.redirect_stdout(io.StringIO()):
      packing.main([files, '--source', 'jsonl', '--output', pack])
    for source, root in (('jsonl', files), ('pack', pack)):
      rate, wait = _train(source, root, os.path.join(folder, f'run_{source}'), options)
      print(f'{source:>6}: {rate:8.1f} examples/s, waits for input {wait:.2%}', flush=True)


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench input_wait', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', default='tiny', help='value of config.model.size')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--pictures', type=int, default=500)
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE', help='changes to the config')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
