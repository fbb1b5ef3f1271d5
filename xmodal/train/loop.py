"""A run from start to end: sources, state, steps, evaluations, checkpoints."""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from xmodal import config as configs
from xmodal.data import pipeline
from xmodal.data.augment import Augmentation
from xmodal.data.boxes import BadBoxes
from xmodal.data.memory import KeepDecoded
from xmodal.data.faults import fault_notes
from xmodal.data.sources import check_flags, open_source
from xmodal.errors import UserError
from xmodal.models import lora
from xmodal.sharding import mesh as meshes
from xmodal.train import build, checkpoint, evaluate, weights
from xmodal.train import state as states
from xmodal.train.frozen import frozen_names, split
from xmodal.train.optimizer import make_optimizer, make_schedule
from xmodal.train.prefetch import Prefetch
from xmodal.train.report import Report
from xmodal.train.step import make_train_step

_MOST_SKIPPED = 10
_MOST_BOXES = 20  # bad ones that are shown
# What a run may be continued or evaluated with though it was begun without.
_MAY_CHANGE = ('train.steps', 'train.eval_every', 'train.checkpoint_every', 'train.log_every',
               'train.keep_checkpoints', 'train.samples', 'data.root', 'data.eval_split',
               'data.eval_examples', 'data.max_bad_share', 'data.memory_mb', 'model.attention',
               'model.dtype', 'model.remat', 'vqa.beams', 'detection.threshold', 'mesh.data', 'mesh.fsdp', 'mesh.tensor')


class Run:
  """One model, its data and its state, as a config says."""

  def __init__(self, config, workdir: str, mode: str = 'train'):
    """Checks the config and opens the data; compiles and writes nothing.

    Args:
      config: the whole config.
      workdir: absolute path of the run's folder.
      mode: 'eval' opens no training data; all else is for training.

    Raises:
      UserError: the config, the data or the workdir cannot be used.
    """
    configs.check(config)
    self.workdir = workdir
    self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    meshes.check_batch(self.mesh, config.train.batch_size, config.train.accumulation)
    self.assets = os.path.join(workdir, checkpoint.ASSETS)
    task_weights = build.task_weights(config)
    if mode == 'eval':
      begun = os.path.join(checkpoint.find(workdir), checkpoint.ASSETS)
    else:  # what a run left that came to no checkpoint is written over
      begun = self.assets if checkpoint.saved_steps(workdir) else None
    checkpoints = {} if begun else weights.open_checkpoints(config)
    self.towers = weights.load_towers(begun) if begun else weights.towers_of(checkpoints)
    self.config = config = build.settle(config, self.towers)
    if begun:
      _check_continues(config, configs.load(os.path.join(begun, 'config.json')), workdir)
    splits = {'train': config.data.train_split} if mode != 'eval' else {}
    splits['eval'] = config.data.eval_split
    self.sources = {use: open_source(config, split, train=use == 'train')
                    for use, split in splits.items()}
    samples = {use: pipeline.sample(source) for use, source in self.sources.items()}
    self._learned = not begun
    self.tokenizer, self.tasks = (
        build.load_assets(config, begun) if begun else build.learn(
            config, samples['train'], checkpoints['text'].folder if 'text' in checkpoints else ''))
    self.notes = [line for use, source in self.sources.items()
                  for line in fault_notes(use, source, check_flags(config, splits[use]))]
    self.notes += _survey(self.tasks, samples)
    self.asked = {name: task.asked_of(samples['eval']) for name, task in self.tasks.items()}

    self.bad = {split: pipeline.BadPictures(len(source), config.data.max_bad_share)
                for split, source in self.sources.items()}
    self.bad_boxes = {split: BadBoxes() for split in self.sources}
    self._decode = KeepDecoded(config.data.memory_mb * 2**20)
    self.model = build.make_model(config, self.tokenizer, self.tasks, self.towers)
    # As training sees the tasks; there may be no training data.
    make = dataclasses.replace(self.maker('eval'), tasks=self.tasks)
    one = make(np.array([-1]), np.array([0]))
    self.batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.train.batch_size, *x.shape[1:]), x.dtype), one)
    variables = states.variables_fn(self.model, self.batch, config.seed)
    params = jax.eval_shape(variables)['params']
    lora.check(config.model.lora, params)
    self.frozen = frozen_names(config.optimizer.frozen, params)
    if self.frozen:
      trained = split(params, self.frozen)[0]
      self.notes.append(f'{_count(trained):,} of {_count(params):,} parameters are trained')
    schedule = make_schedule(config.optimizer, config.train.steps)
    self.optimizer = make_optimizer(config.optimizer, schedule, params)
    self.init = states.init_fn(variables, self.optimizer, config.seed, config.train.ema_decay > 0,
                               self.frozen)
    self.abstract = states.abstract_state(self.init, self.optimizer, self.mesh, self.frozen)
    self.loader = weights.Loader(checkpoints, self.model.backbone, self.abstract)
    self.notes += [*build.overruled(config, self.towers), *self.loader.report()]
    self._step = make_train_step(
        self.model, self.tasks, task_weights, self.optimizer,
        accumulation=config.train.accumulation, ema_decay=config.train.ema_decay,
        frozen=self.frozen)
    self.predict_step = evaluate.make_predict_step(
        build.make_model(config, self.tokenizer, self.asked, self.towers), self.mesh)

  def maker(self, split: str) -> pipeline.BatchMaker:
    """What turns records of a split ('train' or 'eval') into batches."""
    data = self.config.data
    augmentation = Augmentation(**data.augment.to_dict()) if split == 'train' else None
    return pipeline.BatchMaker(
        self.sources[split], self.tasks if split == 'train' else self.asked,
        (data.image_size, data.image_size), self.bad[split], augmentation, data.blank,
        self.config.seed, self._decode, data.keep_aspect, self.bad_boxes[split])

  def compile_step(self):
    """The training step, compiled for the mesh: (state, batch) -> (state, metrics)."""
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    sharding = meshes.batch_sharding(self.mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                         self.batch)
    step = jax.jit(self._step, donate_argnums=0,
                   out_shardings=(shardings, meshes.replicated(self.mesh)))
    return step.lower(self.abstract, batch).compile()

  def evaluate(self, variables, step: int, report: Report | None = None,
               stop: threading.Event | None = None) -> dict[str, dict] | None:
    """Scores the eval split; writes predictions and sample pictures.

    Returns {task: scores}, or None if `stop` was set on the way.
    """
    make, split = self.maker('eval'), self.config.data.eval_split
    predicted = evaluate.predict_all(self.predict_step, variables, make,
                                     self.config.train.batch_size, self.mesh, stop)
    if predicted is None:
      return None
    records, predictions = predicted
    examples = [make.source[int(record)] for record in records]
    predictions = {name: task.relate(examples, predictions[name])
                   for name, task in self.asked.items()}
    scores = evaluate.score_all(self.asked, examples, predictions)
    if jax.process_index() == 0:
      for name, task in self.asked.items():
        evaluate.write_predictions(
            os.path.join(self.workdir, f'predictions_{name}_{split}.jsonl'), task, records,
            examples, predictions[name])
        evaluate.write_files(self.workdir, name, split, task, examples, predictions[name])
        evaluate.write_samples(os.path.join(self.workdir, 'samples', f'{name}_{split}_{step:07d}.png'),
                               task, make, records, examples, predictions[name],
                               self.config.train.samples)
    if report:
      report.write(step, 'eval', {f'{name}/{key}': number for name, of_task in scores.items()
                                  for key, number in of_task.items()})
    return scores

  def tables(self, scores: dict[str, dict]) -> str:
    """The scores of all tasks, for the terminal."""
    return '\n\n'.join(t for name, task in self.asked.items() if scores[name]
                       for t in [task.table(scores[name])] if t)

  def train(self) -> dict:
    """Trains to the end; returns what final.json holds.

    SIGTERM and SIGINT (Ctrl-C) save and end it early: {}.
    """
    with _stop_signals() as stop:
      return self._train(stop)

  def _train(self, stop):
    began = time.perf_counter()
    config = self.config
    os.makedirs(self.workdir, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(self.workdir, config.train.keep_checkpoints)
    warnings = []
    state = checkpoints.restore(self.abstract, warnings.append)
    start = 0 if state is None else int(state.step)
    report = Report(self.workdir, steps=config.train.steps, start=start,
                    batch_size=config.train.batch_size)
    for line in [*warnings, *self.notes]:
      report.say(line)
    # The other hosts look for the same files when they start.
    multihost_utils.sync_global_devices('all have looked')
    if jax.process_index() == 0:
      if self._learned:
        build.save_assets(config, self.tokenizer, self.tasks, self.towers, self.assets)
      configs.save(config, os.path.join(self.assets, 'config.json'))
      configs.save(config, os.path.join(self.workdir, 'config.json'))
    report.say(f'{"starting" if state is None else f"going on from step {start}"} in {self.workdir}: '
               f'{_count(self.abstract.params) / 1e6:.2f}M parameters, '
               f'{len(self.sources["train"])} training examples, '
               f'{len(self.sources["eval"])} to evaluate on; '
               + ('compiling' if start < config.train.steps else 'nothing left to train, evaluating'))
    batches = Prefetch(lambda: pipeline.train_batches(
        self.maker('train'), config.train.batch_size, start, config.train.steps,
        meshes.local_rows(self.mesh, config.train.batch_size)), self.mesh, config.train.batch_size)
    with contextlib.ExitStack() as closing:  # each is closed, whatever befalls the others
      for part in (checkpoints, report, batches):
        closing.callback(part.close)
      if state is None:
        state = self.loader.fill(states.create(self.init, self.abstract))
      state, scores = self._steps(state, start, batches, checkpoints, report, stop)
    if scores is None:
      report.say(f'stopped after step {int(state.step)}: saved; the same command goes on')
      return {}
    return self._finish(state, scores, start, time.perf_counter() - began, report)

  def _steps(self, state, start, batches, checkpoints, report, stop):
    """Steps from start to the end; returns the state and its scores, None if it was stopped."""
    train = self.config.train
    if start >= train.steps:
      return state, self.evaluate(state.variables, start, report, stop)
    train_step = self.compile_step()
    running, told = collections.deque(), int(state.skipped)
    report.pause(start)
    for step in range(start + 1, train.steps + 1):
      state, metrics = train_step(state, batches.next())
      running.append((step, metrics))
      last = step == train.steps
      # Two steps stay in flight; looking at the last one would make the device wait.
      while len(running) > (0 if last else 2):
        told = self._look(*running.popleft(), report, told)
      stopping = stop.is_set() if jax.process_count() == 1 else checkpoints.preempted(step)
      if last or stopping or step % train.checkpoint_every == 0:
        checkpoints.save(state, self.assets)
      if stopping:
        return state, None
      if last or step % train.eval_every == 0:
        scores = self.evaluate(state.variables, step, report, stop)
        if scores is None:
          checkpoints.save(state, self.assets)
          return state, None
        for name, of_task in scores.items():
          if line := self.asked[name].headline(of_task):
            report.say(f'evaluation at step {step}: {name} {line}')
        report.pause(step)
    return state, scores

  def _look(self, step, metrics, report, told):
    """Reports the numbers of one step; returns how many skipped steps have been told of."""
    numbers = {key: float(value) for key, value in jax.device_get(metrics).items()}
    if numbers['skipped'] > told:
      told = int(numbers['skipped'])
      report.say(f'step {step}: gradients are not finite, step skipped ({told} so far)')
    if numbers['skipped_in_a_row'] >= _MOST_SKIPPED:
      raise UserError(
          f'gradients were not finite for {_MOST_SKIPPED} steps in a row, the last at step {step}: '
          f'lower config.optimizer.learning_rate={self.config.optimizer.learning_rate} or '
          f'config.optimizer.clip_norm, and start in a new --workdir')
    if step % self.config.train.log_every == 0 or step == self.config.train.steps:
      report.train(step, numbers)
    report.advance(step, numbers)
    return told

  def _finish(self, state, scores, start, seconds, report):
    path = os.path.join(self.workdir, 'final.json')
    steps = int(state.step) - start
    final = {
        'step': int(state.step), 'evaluation': scores, 'seconds': round(seconds, 1),
        'examples_per_second': round(steps * self.config.train.batch_size / seconds, 1),
        'resumed_from': start, 'skipped_steps': int(state.skipped),
        'unreadable_pictures': {split: bad.told() for split, bad in self.bad.items()},
        'boxes_outside': {split: bad.told() for split, bad in self.bad_boxes.items()},
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}'}
    # A run that had ended has told its time already.
    if jax.process_index() == 0 and (steps or not os.path.exists(path)):
      with open(f'{path}.part', 'w', encoding='utf-8') as f:
        json.dump(final, f, indent=2)
      os.replace(f'{path}.part', path)
    for line in self._left_out():
      report.say(line)
    return final

  def _left_out(self):
    """Lines on the pictures that could not be read, and on boxes that are not inside theirs."""
    lines = [line for split, bad in self.bad.items() if bad.reasons for line in (
        f'{split}: {len(bad.reasons)} of {len(self.sources[split])} examples were left out, their '
        'pictures cannot be read:', *(f'  {reason}' for reason in bad.told()))]
    for split, bad in self.bad_boxes.items():
      if told := bad.told():
        lines.append(f'{split}: {len(told)} boxes in {len(bad.of_record)} of '
                     f'{len(self.sources[split])} examples are not inside their pictures; they were '
                     'cut at the edge, or left out where nothing of them is inside:')
        lines += [f'  {line}' for line in told[:_MOST_BOXES]]
        if len(told) > _MOST_BOXES:
          lines.append(f'  and {len(told) - _MOST_BOXES} more')
    return lines

  def eval_only(self) -> dict[str, dict]:
    """Scores the newest checkpoint of the workdir; returns {task: scores}."""
    folder = checkpoint.find(self.workdir)
    lead = jax.process_index() == 0
    if lead:
      print('\n'.join([*self.notes, f'scoring {folder}']), flush=True)
    variables = checkpoint.load_variables(
        folder, {'params': self.abstract.params, **self.abstract.collections},
        ema=self.config.train.ema_decay > 0)
    scores = self.evaluate(variables, int(os.path.basename(folder)))
    if lead:
      for line in self._left_out():
        print(line, flush=True)
    return scores


def _count(params):
  return sum(x.size for x in jax.tree.leaves(params))


def _survey(tasks, samples):
  """What there is to say of the examples; UserError if they cannot be trained on."""
  notes = []
  for use, examples in samples.items():
    for name, task in tasks.items():
      if use == 'train' or any(e.has(*task.needs) for e in examples):
        notes += [f'{use}: {note}' for note in task.survey(examples)]
      else:
        notes.append(f'{use}: {name}: no example has {" and ".join(task.needs)}; predictions are '
                     'made but not scored')
  return notes


def _check_continues(config, begun, workdir):
  """Raises UserError where a workdir's run was begun with another config."""
  def flat(tree, prefix=''):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from flat(value, f'{prefix}{key}.')
      else:
        yield f'{prefix}{key}', value

  now, then = (dict(flat(json.loads(c.to_json()))) for c in (config, begun))
  changed = [key for key in sorted(now.keys() | then.keys())
             if now.get(key) != then.get(key) and key not in _MAY_CHANGE]
  if changed:
    what = ', '.join(f'{key}={then.get(key)!r} there and {now.get(key)!r} here' for key in changed[:3])
    raise UserError(f'{workdir} holds a run with another config ({what}): give another --workdir, '
                    'or delete that folder')


@contextlib.contextmanager
def _stop_signals():
  """Gives an event that SIGTERM and the first SIGINT set."""
  stop = threading.Event()
  # Of several processes, all have to stop at one step: Orbax sees to that.
  if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
    yield stop
    return

  def heed(*_):
    stop.set()
    signal.signal(signal.SIGINT, before[signal.SIGINT])

  before = {number: signal.signal(number, heed) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
