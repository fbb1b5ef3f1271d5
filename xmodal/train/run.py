"""Runs training, and evaluates the newest checkpoint of a run."""

import contextlib
import json
import os
import time

import jax
from jax.experimental import multihost_utils

from xmodal import atomic, strict_json
from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.mixer import unusable
from xmodal.mixer.feed import data_notes, each_split
from xmodal.sharding import mesh as meshes
from xmodal.train import build
from xmodal.train.checkpoints import checkpoint
from xmodal.train.hooks.evaluate import Evaluating
from xmodal.train.hooks.profile import Profiling
from xmodal.train.hooks.save import Saving
from xmodal.train.logs.goodput import Goodput
from xmodal.train.logs.report import Report
from xmodal.train.loop import run_steps
from xmodal.train.optimizer.schedules import changed_rate
from xmodal.train.plan import Plan, count
from xmodal.train.process import lock, together
from xmodal.train.process.readers import readers
from xmodal.train.process.stop import signals
from xmodal.train.steps import state as states
from xmodal.train.steps.prefetch import Prefetch


def train(plan: Plan) -> dict:
  """Trains to the end; returns the content of final.json.

  On SIGTERM or SIGINT (Ctrl-C), saves and returns {} early.
  """
  with signals() as stop, lock.hold(plan.folder.address):
    together.agree(lambda: _check_unchanged(plan), lead=True)
    with plan.folder.sent_at_the_end():
      final = _train(plan, stop)
    # Until all have ended, each process may have to report its step to the others.
    multihost_utils.sync_global_devices('all have ended')
    return final


def evaluate_newest(plan: Plan) -> dict[str, dict]:
  """Scores the workdir's newest checkpoint by the default evaluation; returns {task: scores}.

  Raises UserError if another run uses the workdir.
  """
  with lock.hold(plan.folder.address), plan.folder.sent_at_the_end():
    folder = checkpoint.find(plan.folder.address)
    lead = jax.process_index() == 0
    if lead:
      print('\n'.join([*plan.notes, f'scoring {folder}']), flush=True)
    variables = checkpoint.load_variables(
        checkpoint.whole(folder), plan.abstract_variables, ema=plan.config.train.ema_decay > 0)
    with readers(plan, lambda line: print(line, flush=True), trains=False):
      scores = plan.evaluation.run(variables, int(os.path.basename(folder)), plan.workdir)
    unusable.exchange(plan.feeds)
    if lead:
      for line in data_notes(plan.feeds):
        print(line, flush=True)
    return scores


def _check_unchanged(plan):
  # Another run may have added to it meanwhile.
  plan.folder.fetch()
  if plan.is_new == bool(checkpoint.saved_steps(plan.folder.address)):
    raise UserError(f'{plan.folder.address}: another run used it while this one started; run '
                    'the same command again')
  return ''


def _train(plan, stop):
  began, config, workdir = time.perf_counter(), plan.config, plan.workdir
  os.makedirs(workdir, exist_ok=True)
  best = plan.best
  checkpoints = checkpoint.Checkpoints(plan.folder.address, config.train.keep_checkpoints,
                                       lambda: best.step, workdir)
  warnings = []
  state = checkpoints.restore(plan.abstract, warnings.append)
  start = 0 if state is None else int(state.step)
  best.forget_after(start)
  if state is not None:
    step = os.path.join(plan.folder.address, 'checkpoints', str(start))
    saved = os.path.join(checkpoint.local_copy(step, (checkpoint.ASSETS,)), checkpoint.ASSETS,
                         'config.json')
    if os.path.exists(saved):
      warnings += changed_rate(config, configs.load(saved), start)
  ends = start >= config.train.steps or best.is_exhausted
  goodput = Goodput(workdir, start, plan.began, writes=jax.process_index() == 0)
  report = Report(workdir, steps=config.train.steps, start=start, batch_size=plan.rows, scored={
      name: one.scored for name, one in plan.evaluations.items() if one.is_due(start)},
                  evaluates=ends, config=config, goodput=goodput)
  for line in [*warnings, *plan.notes]:
    report.say(line)
  # The other hosts read the same files when they start.
  multihost_utils.sync_global_devices('all have looked')
  _write_assets(plan)
  saving = Saving(plan, checkpoints)
  if state is not None:
    saving.load_left_out()
  report.say(f'{"starting" if state is None else f"resuming from step {start}"} in '
             f'{plan.folder.address}: '
             f'{count(plan.abstract.params) / 1e6:.2f}M parameters, {_sizes(plan, "train")} '
             f'training examples, {_sizes(plan, "eval")} to evaluate on; '
             f'{"nothing left to train, evaluating" if ends else "compiling"}')
  with contextlib.ExitStack() as closing:  # closes each, even if closing another fails
    for part in (report, checkpoints):  # in reverse order, as the report closes the account of time
      closing.callback(part.close)
    closing.enter_context(readers(plan, report.say))
    batches = Prefetch(lambda: plan.stream('train').batches(
        plan.sampling, config.train.batch_size, start, config.train.steps,
        meshes.local_rows(plan.mesh, config.train.batch_size)), plan.mesh, config.train.batch_size)
    closing.callback(batches.close)
    if state is None:
      state = plan.loader.fill(states.create(plan.init, plan.abstract))
    evaluating = Evaluating(plan, report, saving)
    profiling = Profiling(config.train, workdir, start, report.say)
    closing.callback(profiling.close)
    state, finished = run_steps(plan, state, batches.next, evaluating, saving, profiling, report,
                                stop)
  if not finished:
    report.say(f'stopped after step {int(state.step)}: saved; run the same command to resume')
    return {}
  saving.note_left_out()
  return _finish(plan, state, evaluating, start, time.perf_counter() - began, report, goodput)


def _write_assets(plan):
  """Writes the files that checkpoints and predictions need besides the state."""
  if jax.process_index() == 0:
    if plan.is_new:
      with atomic.written_folder(plan.assets) as folder:
        build.save_assets(plan.config, plan.tokenizer, plan.tasks, plan.towers, folder)
    configs.save(plan.config, os.path.join(plan.assets, 'config.json'))
    configs.save(plan.config, os.path.join(plan.workdir, 'config.json'))


def _sizes(plan, use):
  return ' + '.join(str(len(feed.sources[use])) for feed in plan.feeds)


def _finish(plan, state, evaluating, start, seconds, report, goodput):
  path, feeds = os.path.join(plan.workdir, 'final.json'), plan.feeds
  steps = int(state.step) - start
  final = {
      'step': int(state.step), **evaluating.final, 'seconds': round(seconds, 1),
      **{key: float(f'{number:.5g}') for key, number in report.speed.means().items()},
      **(report.costs.numbers() if report.costs else {}), **goodput.total(),
      'resumed_from': start, 'skipped_steps': int(state.skipped),
      'unreadable_pictures': {name: feed.bad[use].lines() for name, feed, use in each_split(feeds)},
      'boxes_outside': {name: feed.bad_boxes[use].lines() for name, feed, use in each_split(feeds)},
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}'}
  # A run that had already ended has reported its time.
  if jax.process_index() == 0 and (steps or not _is_json(path)):
    with atomic.written(path) as f:
      f.write(strict_json.dumps(final, indent=2))
  for line in data_notes(feeds):
    report.say(line)
  return final


def _is_json(path):
  try:
    with open(path, encoding='utf-8') as f:
      return isinstance(json.load(f), dict)
  except (FileNotFoundError, ValueError):  # a crash may have truncated it
    return False
