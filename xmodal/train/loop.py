"""A run from start to end: sources, state, steps, evaluations, checkpoints."""

import collections
import contextlib
import json
import os
import re
import time

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np

from xmodal import atomic, paths, strict_json
from xmodal import config as configs
from xmodal.data import pipeline
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.errors import UserError
from xmodal.mixer import met
from xmodal.mixer.balance.balance import make_balance
from xmodal.mixer.feed import Feed, Stream, each_split, left_out, open_feeds, unread
from xmodal.mixer.sampling.sampling import Kind, make_sampling
from xmodal.models import lora
from xmodal.sharding import hosts
from xmodal.sharding import mesh as meshes
from xmodal.train import build, checkpoint, evaluate, holder, shares, together, weights
from xmodal.train import state as states
from xmodal.train.frozen import frozen_names, split
from xmodal.train.measure import Measuring, make_measure
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.optimizer.schedules import changed_rate, make_schedule
from xmodal.train.prefetch import Prefetch
from xmodal.train.report import Report
from xmodal.train.step import make_train_step
from xmodal.train.stop import Stop, signals
from xmodal.train.towers import overruled

_MOST_SKIPPED = 10


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
    self.workdir = workdir = paths.local(workdir, '--workdir')
    if mode != 'dry_run':
      holder.check_free(workdir)
    self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    evaluate.check_batch_size(config, self.mesh)
    if mode != 'eval':
      meshes.check_batch(self.mesh, config.train.batch_size, config.train.accumulation)
    self.assets = os.path.join(workdir, checkpoint.ASSETS)
    self._met = os.path.join(workdir, 'left_out.json')
    task_weights = build.task_weights(config)
    if mode == 'eval':
      begun = os.path.join(checkpoint.find(workdir), checkpoint.ASSETS)
    else:  # what a run left that came to no checkpoint is written over
      checkpoint.check_not_all_damaged(workdir)
      begun = self.assets if checkpoint.saved_steps(workdir) else None
    checkpoints = {} if begun else weights.open_checkpoints(config)
    self.towers = weights.load_towers(begun) if begun else weights.towers_of(checkpoints)
    self.config = config = build.settle(config, self.towers)
    if begun:
      _check_continues(config, configs.load(os.path.join(begun, 'config.json')), workdir)
    names = build.task_names(config)
    uses = ('eval',) if mode == 'eval' else ('train', 'eval')
    self.feeds = open_feeds(config, names, uses)
    self.sampling = make_sampling(config, {
        name: len(feed.sources[uses[0]]) for name in names for feed in self.feeds
        if name in feed.tasks})
    self.balance = make_balance(config, all(kind.tasks == names for kind in self.sampling.kinds))
    samples = {use: {name: of_source for feed in self.feeds
                     for of_source in [pipeline.sample(feed.sources[use])] for name in feed.tasks}
               for use in uses}
    self._learned = not begun
    self.tokenizer, self.tasks = (
        build.load_assets(config, begun) if begun else build.learn(
            config, samples['train'], checkpoints['text'].folder if 'text' in checkpoints else ''))
    self.notes = [*unread(config, names),
                  *(line for use in uses for feed in self.feeds for line in feed.notes(use))]
    self.notes += _survey(self.tasks, samples)
    self._scored = [name for name, task in self.tasks.items()
                    if any(e.has(*task.needs) for e in samples['eval'][name])]
    self.eval_tasks = {name: task.for_split(samples['eval'][name])
                       for name, task in self.tasks.items()}
    self.eval_batch_size = evaluate.choose_batch_size(config, self.eval_tasks, self.mesh)

    self._decode = KeepDecoded(config.data.memory_mb * 2**20)
    self.model = build.make_model(config, self.tokenizer, self.tasks, self.towers)
    self.batch = self._batch(names)
    variables = states.variables_fn(self.model, self.batch, config.seed)
    params = jax.eval_shape(variables)['params']
    lora.check(config.model.lora, params)
    self.frozen = frozen_names(config.optimizer.frozen, params)
    if self.frozen:
      trained = split(params, self.frozen)[0]
      self.notes.append(f'{_count(trained):,} of {_count(params):,} parameters are trained')
    self._used = {name: self._parameters_of(name) for name in names} if len(names) > 1 else {}
    self.resting = {kind: shares.resting(kind, self._used, params, self.frozen)
                    for kind in self.sampling.kinds}
    schedule = make_schedule(config.optimizer, config.train.steps)
    self.optimizer = make_optimizer(config.optimizer, schedule, params, self.resting.values())
    self.init = states.init_fn(variables, self.optimizer, config.seed, config.train.ema_decay > 0,
                               self.frozen, self.balance)
    self.abstract = states.abstract_state(self.init, self.optimizer, self.mesh, self.frozen)
    self._recent = {}  # the last numbers of each kind that no line has told yet
    self.loader = weights.Loader(checkpoints, self.model.backbone, self.abstract)
    self.notes += [*overruled(config, self.towers), *self.loader.report()]
    self._task_weights = task_weights
    self.notes += [*shares.notes(self.feeds, self.sampling, config.train),
                   *shares.never_updated(self.resting)]
    self.predict_step = evaluate.make_predict_step(
        build.make_model(config, self.tokenizer, self.eval_tasks, self.towers), self.mesh)

  def maker(self, use: str, feed: Feed | None = None) -> pipeline.BatchMaker:
    """What turns records of a use ('train' or 'eval') into flat batches of a feed.

    None is the first feed.
    """
    return (feed or self.feeds[0]).maker(
        use, self.tasks if use == 'train' else self.eval_tasks, self._decode)

  def stream(self, use: str) -> Stream:
    """What makes batches of all feeds."""
    return Stream({feed.name: self.maker(use, feed) for feed in self.feeds})

  def _batch(self, tasks):
    """Shapes and dtypes of a batch of some tasks."""
    # As training sees the tasks; there may be no training data.
    stream = Stream({
        feed.name: feed.maker('eval', self.tasks, self._decode) for feed in self.feeds})
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((self.config.train.batch_size, *x.shape[1:]), x.dtype),
        stream.filler(tasks))

  def _parameters_of(self, task):
    """Paths of the parameters that a task uses: those that a model for it alone would have."""
    variables = states.variables_fn(self.model, self._batch((task,)), self.config.seed)
    return frozenset(traverse_util.flatten_dict(jax.eval_shape(variables)['params'], sep='/'))

  def compile_step(self, kind: Kind | None = None):
    """A training step, compiled for the mesh: (state, batch) -> (state, metrics).

    kind: of self.sampling.kinds; None: the first.
    """
    kind = kind or self.sampling.kinds[0]
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
    step = make_train_step(
        self.model, {name: self.tasks[name] for name in kind.tasks}, self._task_weights,
        self.optimizer, accumulation=self.config.train.accumulation,
        ema_decay=self.config.train.ema_decay, frozen=self.frozen, balance=self.balance,
        resting=self.resting[kind], shared=shares.shared(self._used, self.frozen))
    return jax.jit(meshes.over(self.mesh, step), donate_argnums=0,
                   out_shardings=(shardings, meshes.replicated(self.mesh))).lower(
                       self.abstract, self._laid_out(self._batch(kind.tasks))).compile()

  def compile_predict(self, feed: Feed):
    """The step of evaluation on the pictures of a feed, compiled: (variables, batch) ->
    predictions."""
    filler = self.maker('eval', feed)(np.array([-1]), np.array([0]))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((self.eval_batch_size, *x.shape[1:]), x.dtype), filler)
    return self.predict_step.lower(self._abstract_variables, self._laid_out(batch)).compile()

  @property
  def _abstract_variables(self):
    return {'params': self.abstract.params, **self.abstract.collections}

  def compile_measure(self):
    """What compares the gradients of all tasks, compiled: (state, batch) -> metrics."""
    measure = make_measure(
        self.model, self.tasks, self._task_weights, accumulation=self.config.train.accumulation,
        frozen=self.frozen, shared=shares.shared(self._used, self.frozen))
    return jax.jit(meshes.over(self.mesh, measure),
                   out_shardings=meshes.replicated(self.mesh)).lower(
                       self.abstract, self._laid_out(self.batch)).compile()

  def _laid_out(self, batch):
    sharding = meshes.batch_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)

  def evaluate(self, variables, step: int, report: Report | None = None,
               stop: Stop | None = None) -> dict[str, dict] | None:
    """Scores the eval split; writes predictions and sample pictures.

    Returns {task: scores}, or None if it was stopped on the way.
    """
    scores = {}
    for feed in self.feeds:
      of_feed = evaluate.evaluate_source(
          self.predict_step, variables, self.maker('eval', feed), feed.split('eval'), self.config,
          self.workdir, self.mesh, self.eval_batch_size, step, stop)
      if of_feed is None:
        return None
      scores |= of_feed
    if report:
      report.write(step, 'eval', {f'{name}/{key}': number for name, of_task in scores.items()
                                  for key, number in of_task.items()})
    return scores

  def tables(self, scores: dict[str, dict]) -> str:
    """The scores of all tasks, for the terminal."""
    found = {name: task.table(scores[name]) or task.headline(scores[name])
             for name, task in self.eval_tasks.items() if scores[name]}
    return '\n\n'.join(f'{name}\n{text}' if len(self.eval_tasks) > 1 else text
                       for name, text in found.items() if text)

  def train(self) -> dict:
    """Trains to the end; returns what final.json holds.

    SIGTERM and SIGINT (Ctrl-C) save and end it early: {}.
    """
    with signals() as stop, holder.hold(self.workdir):
      together.agree(self._check_unchanged, lead=True)
      final = self._train(stop)
      # Until then each process may have to tell the others how far it is.
      multihost_utils.sync_global_devices('all have ended')
      return final

  def _check_unchanged(self):
    if self._learned == bool(checkpoint.saved_steps(self.workdir)):
      raise UserError(f'{self.workdir}: another run was there while this one started; run the same '
                      'command again')
    return ''

  def _train(self, stop):
    began = time.perf_counter()
    config = self.config
    os.makedirs(self.workdir, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(self.workdir, config.train.keep_checkpoints)
    warnings = []
    state = checkpoints.restore(self.abstract, warnings.append)
    start = 0 if state is None else int(state.step)
    saved = os.path.join(self.workdir, 'checkpoints', str(start), checkpoint.ASSETS, 'config.json')
    if state is not None and os.path.exists(saved):
      warnings += changed_rate(config, configs.load(saved), start)
    report = Report(self.workdir, steps=config.train.steps, start=start, batch_size=self._rows,
                    scored=self._scored if self._is_evaluated(start) else ())
    for line in [*warnings, *self.notes]:
      report.say(line)
    # The other hosts look for the same files when they start.
    multihost_utils.sync_global_devices('all have looked')
    if jax.process_index() == 0:
      if self._learned:
        with atomic.written_folder(self.assets) as folder:
          build.save_assets(config, self.tokenizer, self.tasks, self.towers, folder)
      configs.save(config, os.path.join(self.assets, 'config.json'))
      configs.save(config, os.path.join(self.workdir, 'config.json'))
    if state is None:
      how = 'starting'
    else:
      how = f'going on from step {start}'
      met.load(self.feeds, self._met)
    what = 'compiling' if start < config.train.steps else 'nothing left to train, evaluating'
    report.say(f'{how} in {self.workdir}: {_count(self.abstract.params) / 1e6:.2f}M parameters, '
               f'{self._sizes("train")} training examples, {self._sizes("eval")} to evaluate on; '
               f'{what}')
    batches = Prefetch(lambda: self.stream('train').batches(
        self.sampling, config.train.batch_size, start, config.train.steps,
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

  @property
  def _rows(self):
    """Examples of a step, on average."""
    return self.config.train.batch_size * sum(self.sampling.share(f.tasks) for f in self.feeds)

  def _sizes(self, use):
    return ' + '.join(str(len(feed.sources[use])) for feed in self.feeds)

  def _is_evaluated(self, step):
    return step == self.config.train.steps or step % self.config.train.eval_every == 0

  def _steps(self, state, start, batches, checkpoints, report, stop):
    """Steps from start to the end; returns the state and its scores, None if it was stopped."""
    train = self.config.train
    if start >= train.steps:
      return state, self.evaluate(state.variables, start, report, stop)
    with report.pause(start):
      if hosts.agreed(report.owes_evaluation) and (
          self._evaluated(state, start, report, stop, checkpoints) is None):
        return state, None
      steps = [self.compile_step(kind) for kind in self.sampling.kinds]
      measure = Measuring(self, start)
    running, told = collections.deque(), int(state.skipped)
    for step in range(start + 1, train.steps + 1):
      kind, batch = self.sampling.kind(step - 1), batches.next()
      measured = measure(step, state, batch)
      state, metrics = steps[kind](state, batch)
      running.append((step, metrics | measured))
      evaluates = self._is_evaluated(step)
      while len(running) > 2:  # to look at the last one would make the device wait
        told = self._look(*running.popleft(), report, told)
      stopping = stop.reached()
      saves = stopping or step == train.steps or step % train.checkpoint_every == 0
      while running and (evaluates or saves):  # whoever goes on from here makes no such line again
        told = self._look(*running.popleft(), report, told)
      if saves:
        self._save(state, checkpoints)
      if stopping:
        return state, None
      if evaluates:
        with report.pause(step):
          scores = self._evaluated(state, step, report, stop, checkpoints)
        if scores is None:
          return state, None
    return state, scores

  def _evaluated(self, state, step, report, stop, checkpoints):
    """Evaluates between steps; returns the scores, None if it was stopped: the state is saved."""
    try:
      scores = self.evaluate(state.variables, step, report, stop)
    except Exception:
      if jax.process_count() == 1:  # the others may not have failed, and would not save
        self._save(state, checkpoints)
      raise
    if scores is None:
      self._save(state, checkpoints)
      return None
    for name, of_task in scores.items():
      if line := self.eval_tasks[name].headline(of_task):
        report.say(f'evaluation at step {step}: {name} {line}')
    return scores

  def _save(self, state, checkpoints):
    self._note_met()  # first: who goes on from this checkpoint does not meet them again
    checkpoints.save(state, self.assets)

  def _note_met(self):
    met.exchange(self.feeds)
    if jax.process_index() == 0:
      met.save(self.feeds, self._met)

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
    self._recent |= numbers
    share = shares.of_steps(self.sampling, tuple(self.tasks), step)
    if step % self.config.train.log_every == 0 or step == self.config.train.steps:
      report.train(step, self._recent | share)
      self._recent = {}
    report.advance(step, numbers | share)
    return told

  def _finish(self, state, scores, start, seconds, report):
    self._note_met()
    path = os.path.join(self.workdir, 'final.json')
    steps = int(state.step) - start
    final = {
        'step': int(state.step), 'evaluation': scores, 'seconds': round(seconds, 1),
        'examples_per_second': round(report.examples_per_second, 1),
        'resumed_from': start, 'skipped_steps': int(state.skipped),
        'unreadable_pictures': {name: feed.bad[use].told()
                                for name, feed, use in each_split(self.feeds)},
        'boxes_outside': {name: feed.bad_boxes[use].told()
                          for name, feed, use in each_split(self.feeds)},
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}'}
    # A run that had ended has told its time already.
    if jax.process_index() == 0 and (steps or not _is_json(path)):
      with atomic.written(path) as f:
        f.write(strict_json.dumps(final, indent=2))
    for line in left_out(self.feeds):
      report.say(line)
    return final

  def eval_only(self) -> dict[str, dict]:
    """Scores the newest checkpoint of the workdir, which no other run may be in; returns
    {task: scores}."""
    with holder.hold(self.workdir):
      return self._eval_only()

  def _eval_only(self):
    folder = checkpoint.find(self.workdir)
    lead = jax.process_index() == 0
    if lead:
      print('\n'.join([*self.notes, f'scoring {folder}']), flush=True)
    variables = checkpoint.load_variables(
        folder, self._abstract_variables, ema=self.config.train.ema_decay > 0)
    scores = self.evaluate(variables, int(os.path.basename(folder)))
    met.exchange(self.feeds)
    if lead:
      for line in left_out(self.feeds):
        print(line, flush=True)
    return scores


def _is_json(path):
  try:
    with open(path, encoding='utf-8') as f:
      return isinstance(json.load(f), dict)
  except (FileNotFoundError, ValueError):  # a crash may have cut it
    return False


def _count(params):
  return sum(x.size for x in jax.tree.leaves(params))


def _survey(tasks, samples):
  """What there is to say of the examples; UserError if they cannot be trained on."""
  notes = []
  for use, by_task in samples.items():
    for name, task in tasks.items():
      if use == 'train' or any(e.has(*task.needs) for e in by_task[name]):
        notes += [f'{use}: {note}' for note in task.survey(by_task[name])]
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
  may_change = configs.may_change()
  changed = [key for key in sorted(now.keys() | then.keys())
             if now.get(key) != then.get(key)
             and re.sub(r'^mixer\.data\.\w+', 'data', key) not in may_change]
  if changed:
    what = ', '.join(
        f'{key}={then.get(key)!r} there and {now.get(key)!r} here' for key in changed[:3])
    raise UserError(f'{workdir} holds a run with another config ({what}): give another --workdir, '
                    'or delete that folder')
