"""Latency and throughput of `xmodal serve`, compared with a bare loop of the same program.

`xmodal bench serve [--checkpoint DIR | --size S [KEY=VALUE ...]] [--task T]
[--clients 1 8 64] [--seconds 10]` starts the server twice, with batches and without. The bare loop
calls the compiled program on a batch that lies ready; "with pictures" also decodes the pictures and
makes the batch, as the server has to. Everything runs on this machine, clients included. Without a
checkpoint it uses an untrained model, whose speed is the same: five tasks at the size `tiny`, or
with --size the classifier of vqa. Its parameters are then those of the PyTorch model of `xmodal
bench train_step`, which the same server serves as `torch`; it stops if their answers differ by more
than 0.1%.
"""

import argparse
import base64
from collections.abc import Sequence
import io
import json
import math
import os
import sys
import tempfile
import time

import numpy as np

from xmodal import config as configs
from xmodal.bench.harness import changed, check_positive, has_torch, num_threads, run_command
from xmodal.bench.http_load import ServerProcess, http_request, load, predict_body
from xmodal.bench.predict import QUESTIONS, make_checkpoint
from xmodal.errors import UserError

_PICTURES = 32
_TORCH = '''
import sys
from xmodal.bench.torch_serve import TorchEngine
from xmodal.serve.__main__ import main
sys.exit(main(open_engine=TorchEngine))
'''


def pictures(side: int = 96) -> list[bytes]:
  """PNG files of drawn scenes."""
  from PIL import Image

  from xmodal.data.scenes.shapes import Shapes

  source, files = Shapes('val', size=_PICTURES, image_size=side), []
  for number in range(_PICTURES):
    file = io.BytesIO()
    Image.fromarray(source[number].image).save(file, 'PNG')
    files.append(file.getvalue())
  return files


def bare(checkpoint: str, task: str, files: list[bytes], text: str, sizes: tuple[int, ...],
         seconds: float) -> dict[tuple[str, int], tuple[list[float], float]]:
  """Seconds of each call, and pictures per second, of loops without a server.

  Returns:
    {(kind, batch size): (seconds of the calls, pictures per second)}; kinds as in the table.
  """
  import jax

  from xmodal.predictor import Predictor

  predictor = Predictor(checkpoint)
  own = predictor.task(task)
  found = {}
  for size in sizes:
    queries = [own.query(files[number % len(files)], text) for number in range(size)]
    asked, examples = queries[0][0], [e for _, some in queries for e in some]
    captured = {}
    whole = predictor.program(asked)

    def keep(variables, batch):
      captured['batch'] = batch
      return whole(variables, batch)

    predictor.program = lambda task: keep
    with_pictures = lambda: list(predictor.batches(examples, asked, sizes=sizes))
    with_pictures()
    del predictor.program
    batch = jax.device_put(captured['batch'])
    calls = {'bare loop': lambda: jax.device_get(whole(predictor.variables, batch)),
             'with pictures': with_pictures}
    for kind, call in calls.items():
      call()
      taken, end = [], time.perf_counter() + seconds
      while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
      found[kind, size] = taken, size * len(taken) / sum(taken)
  return found


class Answers:
  """The first answer to each request, with which later ones are compared."""

  def __init__(self):
    self._first = {}

  def equal(self, place: int, status: int, body: bytes) -> None:
    """UserError if a response is no answer, or another one than before."""
    first = self._of(place, status, body)
    if first != body:
      raise UserError(f'request {place} had two answers: {first!r} and {body!r}')

  def nearly(self, place: int, status: int, body: bytes) -> None:
    """As `equal`, of a program that rounds otherwise: probabilities within 0.1%."""
    first, found = (json.loads(text) for text in (self._of(place, status, body), body))
    if not math.isclose(first['probability'], found['probability'], rel_tol=1e-3, abs_tol=2e-6):
      raise UserError(f'request {place} had two answers: {first} and {found}')

  def _of(self, place, status, body):
    if status != 200:
      raise UserError(f'the server answered {status}: {body[:200]!r}')
    return self._first.setdefault(place, body)


def untrained(folder: str, size: str | None, changes: Sequence[str] = ()) -> str:
  """Writes a workdir with an untrained model; returns it.

  Args:
    folder: the workdir.
    size: None: predict.make_checkpoint's model; else config.model.size of a classifier of vqa with
      the parameters of torch_serve, if torch is installed.
    changes: KEY=VALUE each, of the config for `size`.
  """
  if not size:
    return make_checkpoint(folder)
  config = configs.base()
  config.mixer.tasks, config.mixer.weights = ('vqa',), (1.0,)
  config.data.image_size, config.vqa.generation_weight = 224, 0.0
  config.data.train_examples, config.data.eval_examples, config.train.batch_size = 500, 8, 8
  changed(config, [f'model.size={size}', *changes])
  if not has_torch():
    return make_checkpoint(folder, config)
  from xmodal.bench import torch_serve
  return make_checkpoint(folder, config, torch_serve.parameters)


def _row(name, taken, rate, base):
  p50, p95, p99 = (1e3 * float(np.percentile(taken, share)) for share in (50, 95, 99))
  return f'{name:<28}{p50:>9.1f}{p95:>9.1f}{p99:>9.1f}{rate:>12.1f}{rate / base:>8.2f}'


def _run(options):
  check_positive(options, 'clients')
  if options.changes and not options.size:
    raise UserError(f'{options.changes[0]}: only for the untrained model of --size')
  if options.size and (options.checkpoint or options.task != 'vqa'):
    raise UserError('--size makes an untrained model of the vqa task alone; leave out --checkpoint '
                    'and --task')
  if options.task not in QUESTIONS:
    raise UserError(f'--task {options.task}: wanted one of {", ".join(QUESTIONS)}')
  sizes, text = tuple(options.sizes), QUESTIONS[options.task][0]
  with tempfile.TemporaryDirectory() as folder:
    checkpoint = options.checkpoint or untrained(os.path.join(folder, 'run'), options.size,
                                                 options.changes)
    files = pictures()
    requests = [http_request(predict_body(base64.b64encode(file).decode(), text, options.task))
                for file in files]
    answers, rows, ready = Answers(), [], []
    loops = bare(checkpoint, options.task, files, text, (sizes[0], sizes[-1]), options.seconds)
    base = loops['bare loop', sizes[-1]][1]
    for (kind, size), (taken, rate) in loops.items():
      rows.append(_row(f'{kind}, batch {size}', taken, rate, base))
    of_torch = {'program': ('-c', _TORCH)}
    for name, arguments, program in (
        ('batches', (), {}), ('one by one', ('--no_batching',), {}),
        *([('torch', (), of_torch)] if options.size and has_torch() else [])):
      with ServerProcess(checkpoint, '--sizes', ','.join(map(str, sizes)), *arguments,
                         **program) as server:
        ready.append(server.wait_until_ready())
        # At larger sizes the last bits depend on the size of a batch, see xmodal/serve/README.md.
        check = answers.nearly if options.size else answers.equal
        for clients in options.clients:
          load(server.port, requests, clients, 1, check)
          taken, rate = load(server.port, requests, clients, options.seconds, check)
          rows.append(_row(f'{name}, {clients} clients', taken, rate, base))
    print(f'{options.task}, {num_threads()} processors, start to ready '
          f'{" and ".join(f"{seconds:.1f}" for seconds in ready)} s\n'
          f'{"":<28}{"p50 ms":>9}{"p95 ms":>9}{"p99 ms":>9}{"pictures/s":>12}{"ratio":>8}')
    print('\n'.join(rows))


def main(argv=None) -> int:
  """Runs a command line; returns its exit code (0, or 2 for a user error)."""
  parser = argparse.ArgumentParser(prog='xmodal bench serve', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', metavar='DIR', help='a workdir, or one of its '
                      'checkpoints/STEP folders')
  parser.add_argument('--size', help='of an untrained model for vqa: small, base, large or xl')
  parser.add_argument('--task', default='vqa')
  parser.add_argument('--clients', type=int, nargs='+', default=[1, 8, 64])
  parser.add_argument('--seconds', type=float, default=10, help='of each row')
  parser.add_argument('--sizes', type=int, nargs='+', default=[2, 8, 32],
                      help='batch sizes of the server')
  parser.add_argument('changes', nargs='*', metavar='KEY=VALUE',
                      help='changes to the config of --size')
  return run_command(_run, parser.parse_args(argv))


if __name__ == '__main__':
  sys.exit(main())
