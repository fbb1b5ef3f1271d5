"""What a config describes: sources, tasks, model, abstract state. Compiles and writes nothing."""

from collections.abc import Mapping
import functools
import json
import os
import re
import time

from flax import traverse_util
import jax

from xmodal import config as configs
from xmodal.data import pipeline
from xmodal.data.overview import Sampled, overview_of
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.errors import UserError
from xmodal.mixer.balance.balance import make_balance
from xmodal.mixer.feed import BatchStream, Feed, open_feeds, unread
from xmodal.mixer.sampling.sampling import make_sampling
from xmodal.models import lora
from xmodal.sharding import mesh as meshes
from xmodal.train import build, evaluation
from xmodal.train.checkpoints import checkpoint
from xmodal.train.hooks import profile
from xmodal.train.hooks.best import Best
from xmodal.train.learned import Learned
from xmodal.train.logs.trackers import tracker
from xmodal.train.optimizer.optimizer import make_optimizer
from xmodal.train.optimizer.schedules import make_schedule
from xmodal.train.process import lock
from xmodal.train.process.mirror import RunFolder
from xmodal.train.start import pretrained, settings
from xmodal.train.start.earlier import open_earlier
from xmodal.train.start.fits import ModelSpec
from xmodal.train.start.teacher import Teacher
from xmodal.train.start.transfer import Transfer
from xmodal.train.steps import resting
from xmodal.train.steps import state as states
from xmodal.train.steps.frozen import frozen_names, split
from xmodal.train.towers import overridden


class Plan:
  """The model, data and abstract state that a config describes.

  Attributes:
    began: when it was made, by time.monotonic.
    config: the whole config, with values from pretrained towers filled in.
    folder: the RunFolder, in a bucket too.
    workdir: absolute path of the run's files on this machine, `folder.local`.
    mesh: the device mesh.
    feeds: sources of training and of the default evaluation.
    sampling, balance: tasks of each step and rule for their weights, see xmodal.mixer.
    tokenizer, tasks, towers: see train.build; tasks by name.
    is_new: whether the workdir has no run to resume; tokenizer and tasks are then learned.
    notes: lines for the user on data and model.
    evaluations: by name, the default first.
    best: the best score so far.
    model: a models.joint.MultiTask.
    batch: shapes and dtypes of a batch of all tasks.
    frozen: paths of parameters that never change.
    resting: by kind of step, paths of parameters it does not update although other kinds do.
    schedule: learning rate by step.
    optimizer: see train.optimizer.
    init: see train.steps.state.init_fn.
    abstract: TrainState of shapes and shardings.
    readers: processes that make batches, see process.readers; None: threads make them.
    loader: loads the weights that the model is initialised from.
    task_weights: weight of each task's loss, by name.
    teacher: the Teacher that the model imitates; None: none.
  """

  def __init__(self, config, workdir: str, mode: str = 'train'):
    """Checks the config and opens the data.

    Args:
      config: the whole config.
      workdir: folder of the run, on this machine or in a bucket.
      mode: 'train'; 'eval' opens no training data; 'dry_run' accepts a workdir in use.

    Raises:
      UserError: the config, the data or the workdir is unusable.
    """
    self.began = time.monotonic()
    configs.check(config)
    if mode != 'eval':
      profile.steps(config.train)
      tracker.check(config.train.trackers)
    self.folder = RunFolder(workdir)
    self.workdir = workdir = self.folder.local
    if mode != 'dry_run':
      self.folder.check_writable()
      lock.check_free(self.folder.address)
      self.folder.fetch()
    self.mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if mode != 'eval':
      meshes.check_batch(self.mesh, config.train.batch_size, config.train.accumulation)
    self.assets = os.path.join(workdir, checkpoint.ASSETS)
    self.task_weights = build.task_weights(config)
    begun = self._begun(mode)
    earlier, checkpoints = None, {}
    if begun:
      begun_config = configs.load(os.path.join(begun, 'config.json'))
      config, self.towers = settings.resume(config, begun_config), pretrained.load_towers(begun)
    else:
      if earlier := open_earlier(config.train):
        config = earlier.resolve(config)
      self.towers = dict(earlier.towers) if earlier else {}
      checkpoints = pretrained.open_checkpoints(config, without=self.towers)
      self.towers |= pretrained.towers_of(checkpoints)
    self.config = config = build.resolve(config, self.towers)
    if begun:
      _check_continues(config, begun_config, self.folder.address)
    names = build.task_names(config)
    uses = ('eval',) if mode == 'eval' else ('train', 'eval')
    self.feeds = open_feeds(config, names, uses)
    self.sampling = make_sampling(config, {
        name: len(feed.sources[uses[0]]) for name in names for feed in self.feeds
        if name in feed.tasks})
    self.balance = make_balance(config, all(kind.tasks == names for kind in self.sampling.kinds))
    samples = {use: _samples(self.feeds, use) for use in uses}
    self.is_new = not begun
    folder = checkpoints['text'].folder if 'text' in checkpoints else ''
    kept = Learned(config, [] if begun or earlier or folder else self.feeds, names)
    self.tokenizer, self.tasks = (
        build.load_assets(config, begun) if begun else kept.assets(lambda: build.learn(
            config, samples['train'], folder,
            earlier.make_tokenizer if earlier else None)))
    self.notes = [*unread(config, names), *kept.lines(lambda: [
        *(line for use in uses for feed in self.feeds for line in feed.notes(use)),
        *_survey(self.tasks, samples)])]
    self._decode = KeepDecoded(config.data.memory_mb * 2**20)
    self.readers = None
    self.evaluations = self._open_evaluations(names, samples['eval'])
    self.best = Best(config.train, self.evaluations, workdir)
    self.teacher = None
    if config.train.teacher and (mode == 'train' or self.is_new):  # else no step is made
      self.teacher = Teacher(config.train, self.tokenizer, self.tasks, config.data.image_size,
                             self.mesh)

    self.model = build.make_model(config, self.tokenizer, self.tasks, self.towers)
    self.batch = self.batch_of(names)
    variables = states.variables_fn(self.model, self.batch, config.seed)
    params = jax.eval_shape(variables)['params']
    lora.check(config.model.lora, params)
    self.frozen = frozen_names(config.optimizer.frozen, params)
    if self.frozen:
      trained = split(params, self.frozen)[0]
      self.notes.append(
          f'{count(trained):,} of {count(params):,} parameters are trained')
    self.resting = {
        kind: resting.resting(kind, {} if kind.tasks == names else self._used, params, self.frozen)
        for kind in self.sampling.kinds}
    self.schedule = make_schedule(config.optimizer, config.train.steps)
    self.optimizer = make_optimizer(config.optimizer, self.schedule, params,
                                    self.resting.values())
    self.init = states.init_fn(variables, self.optimizer, config.seed, config.train.ema_decay > 0,
                               self.frozen, self.balance)
    self.abstract = states.abstract_state(self.init, self.optimizer, self.mesh, self.frozen)
    spec = ModelSpec(self.model.backbone.vision_tower, self.tokenizer, self.tasks)
    transfer = earlier and Transfer(earlier, self.abstract, spec, self.model.lora, self.mesh)
    self.loader = pretrained.Loader(checkpoints, self.model.backbone, self.abstract, transfer)
    self.notes += [*overridden(config, self.towers), *self.loader.report(),
                   *resting.notes(self.feeds, self.sampling, config.train),
                   *resting.never_updated(self.resting)]

  def _begun(self, mode):
    """Assets folder of the run to resume; None for a new run."""
    address = self.folder.address
    if mode != 'eval':
      # A run that ended before its first checkpoint is overwritten.
      checkpoint.check_not_all_damaged(address)
      if not checkpoint.saved_steps(address):
        return None
    if mode == 'train' or (mode == 'dry_run' and not self.folder.is_remote):
      return self.assets
    step = checkpoint.local_copy(checkpoint.find(address), (checkpoint.ASSETS,))
    return os.path.join(step, checkpoint.ASSETS)

  def _open_evaluations(self, names, samples):
    def make_model(tasks):
      return build.make_model(self.config, self.tokenizer, tasks, self.towers)

    shared = dict(make_model=make_model, mesh=self.mesh, decode=self._decode)
    found = {evaluation.DEFAULT: evaluation.Evaluation(
        evaluation.DEFAULT, None, self.config, self.feeds, self.tasks, samples, **shared)}
    for name, (own, config, feeds) in evaluation.open_named(self.config, names).items():
      found[name] = evaluation.Evaluation(name, own, config, feeds, self.tasks,
                                          _samples(feeds, 'eval'), **shared)
    return found

  @property
  def evaluation(self) -> evaluation.Evaluation:
    """The default evaluation."""
    return self.evaluations[evaluation.DEFAULT]

  @property
  def abstract_variables(self) -> dict:
    """Shapes and shardings of the variables that model.apply takes."""
    return {'params': self.abstract.params, **self.abstract.collections}

  @property
  def rows(self) -> float:
    """Mean number of examples per step."""
    return self.config.train.batch_size * sum(self.sampling.share(f.tasks) for f in self.feeds)

  def maker(self, use: str, feed: Feed | None = None) -> pipeline.BatchMaker:
    """Makes batches of a feed (None: the first) from records of a use, 'train' or 'eval'."""
    if use == 'eval':
      return self.evaluation.maker(feed)
    return (feed or self.feeds[0]).maker(use, self.tasks, self._decode, use, self.readers)

  def stream(self, use: str) -> BatchStream:
    """Makes batches of all feeds."""
    return BatchStream({feed.name: self.maker(use, feed) for feed in self.feeds})

  def batch_of(self, tasks: tuple[str, ...]) -> Mapping:
    """Shapes and dtypes of a batch of some tasks."""
    # With the tasks of training; the 'eval' sources, as training data may not be open.
    stream = BatchStream({
        feed.name: feed.maker('eval', self.tasks, self._decode) for feed in self.feeds})
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((self.config.train.batch_size, *x.shape[1:]), x.dtype),
        stream.filler(tasks))

  @functools.cached_property
  def shared(self) -> frozenset[str]:
    """Paths of the trained parameters that two or more tasks use."""
    return resting.shared(self._used, self.frozen)

  @functools.cached_property  # tracing the model once more for each task takes seconds
  def _used(self):
    """{task: paths of the parameters that a model with this task only has}."""
    shapes = {name: jax.eval_shape(states.variables_fn(
        self.model, self.batch_of((name,)), self.config.seed)) for name in self.tasks}
    return {name: frozenset(traverse_util.flatten_dict(shape['params'], sep='/'))
            for name, shape in shapes.items()}


def count(params) -> int:
  """Number of parameters in a tree."""
  return sum(x.size for x in jax.tree.leaves(params))


def _samples(feeds, use):
  """Some examples of each task, by task name."""
  return {name: examples for feed in feeds
          for examples in [Sampled(pipeline.sample(feed.sources[use]))] for name in feed.tasks}


def _survey(tasks, samples):
  """Notes on the examples; UserError if they cannot be trained on."""
  notes = []
  for use, by_task in samples.items():
    for name, task in tasks.items():
      if use == 'train' or overview_of(by_task[name]).count(*task.needs):
        notes += [f'{use}: {note}' for note in task.survey(by_task[name])]
      else:
        notes.append(f'{use}: {name}: no example has {" and ".join(task.needs)}; predictions are '
                     'made but not scored')
  return notes


def _check_continues(config, begun, workdir):
  """Raises UserError if the workdir's run was started with another config."""
  def flat(tree, prefix=''):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from flat(value, f'{prefix}{key}.')
      else:
        yield f'{prefix}{key}', value

  now, then = (dict(flat(json.loads(c.to_json()))) for c in (config, begun))
  may_change = configs.may_change()
  changed = [key for key in sorted(now.keys() | then.keys())
             if now.get(key) != then.get(key) and not key.startswith('evaluations.')
             and re.sub(r'^mixer\.data\.\w+', 'data', key) not in may_change]
  if changed:
    what = ', '.join(
        f'{key}={then.get(key)!r} there and {now.get(key)!r} here' for key in changed[:3])
    raise UserError(f'{workdir} holds a run with another config ({what}): give another --workdir, '
                    'or delete that folder')
