"""What a run tells: the terminal, metrics.jsonl and TensorBoard."""

import json
import math
import os
import sys
import threading
import time

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Report:
  """Writes numbers down and shows how training goes; silent on all hosts but the first."""

  def __init__(self, workdir: str, *, steps: int, start: int, batch_size: int):
    """A report on a run of `steps` steps that goes on from step `start`."""
    self._steps, self._batch_size = steps, batch_size
    self._active = jax.process_index() == 0
    self._bar = None
    self._clock, self._clock_step = time.perf_counter(), start
    self._rate = 0.0
    if not self._active:
      return
    self._path = os.path.join(workdir, 'metrics.jsonl')
    _forget_after(self._path, start, steps)
    _quieten_board()
    self._board = SummaryWriter(os.path.join(workdir, 'tensorboard'), purge_step=start or None)
    if sys.stderr.isatty():
      self._bar = tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True, smoothing=0.1)

  def say(self, line: str) -> None:
    """A line for people, above the progress bar."""
    if self._active:
      tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, flush=True)

  def train(self, step: int, metrics: dict[str, float]) -> None:
    """Numbers of one step of training; examples/s is of the time since the last call or pause."""
    now = time.perf_counter()
    if step > self._clock_step:
      self._rate = (step - self._clock_step) * self._batch_size / max(now - self._clock, 1e-9)
    self._clock, self._clock_step = now, step
    self.write(step, 'train', {**metrics, 'examples_per_second': self._rate})
    if not self._active or self._bar is not None:
      return
    left = (self._steps - step) * self._batch_size / max(self._rate, 1e-9)
    self.say(f'step {step}/{self._steps}  {_summary(metrics)}  {self._rate:.0f} examples/s  '
             f'{left / 60:.1f} min left')

  def advance(self, step: int, metrics: dict[str, float]) -> None:
    """Moves the progress bar."""
    if self._bar is not None:
      self._bar.n = step
      self._bar.set_postfix_str(f'{_summary(metrics)}, {self._rate:.0f} examples/s')

  def pause(self, step: int) -> None:
    """Leaves out of examples/s the time since the last call (an evaluation, say)."""
    self._clock, self._clock_step = time.perf_counter(), step

  def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
    """Numbers into TensorBoard and metrics.jsonl: there a line a task ('task/number'), and one
    of the task 'all' for the rest; null where a number is not finite."""
    if not self._active:
      return
    by_task = {}
    for key, number in numbers.items():
      task, _, name = key.partition('/')
      if not name:
        task, name = 'all', key
      by_task.setdefault(task, {})[name] = number if math.isfinite(number) else None
    with open(self._path, 'a', encoding='utf-8') as f:
      for task, named in by_task.items():
        f.write(json.dumps({'step': step, 'split': split, 'task': task, **named}) + '\n')
    for key, number in numbers.items():
      self._board.add_scalar(f'{split}/{key}', number, step)

  def close(self) -> None:
    """Ends the progress bar and flushes the files."""
    if self._active:
      self._board.close()
      if self._bar is not None:
        self._bar.close()


def _quieten_board():
  """Keeps the traceback of TensorBoard's thread off the terminal when the disk is full: whoever
  writes next says so in one line."""
  hook = threading.excepthook
  threading.excepthook = lambda args: (
      None if isinstance(args.exc_value, OSError)
      and type(args.thread).__module__.startswith('tensorboardX') else hook(args))


def _summary(metrics):
  parts = [f'loss {metrics["loss"]:.3f}']
  if any(key.endswith('/share') for key in metrics):  # it is of some tasks, others at other steps
    parts = ['loss ' + ', '.join(f'{key.removesuffix("/loss")} {value:.3f}' for key, value
                                 in metrics.items() if key.endswith('/loss'))]
  parts += [f'{key.replace("/", " ")} {value:.1%}' for key, value in metrics.items()
            if key.endswith(('/accuracy', '/iou'))]
  if metrics['skipped']:
    parts.append(f'{metrics["skipped"]:.0f} steps skipped (gradients not finite)')
  return ', '.join(parts)


def _forget_after(path, step, steps):
  """Drops what comes again: what a killed run wrote after its last checkpoint, and the last
  evaluation of a run that had ended."""
  def comes_again(line):
    line = json.loads(line)
    return line['step'] > step or (line['split'] == 'eval' and line['step'] == step == steps)

  if not os.path.exists(path):
    return
  with open(path, encoding='utf-8') as f:
    # The last line of a killed run may have been cut short.
    lines = [line for line in f if line.endswith('\n') and not comes_again(line)]
  with open(f'{path}.part', 'w', encoding='utf-8') as f:
    f.writelines(lines)
  os.replace(f'{path}.part', path)
