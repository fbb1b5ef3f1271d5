"""The runs of bench.multitask."""

from collections.abc import Sequence
import dataclasses
import os

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.mixer.feed import open_feeds
from xmodal.mixer.sampling.sampling import Sampling, make_sampling
from xmodal.tasks.task import TASKS

SHARES = (1.0, 0.3, 0.1, 0.03)  # of the answers
# Turns of alternating, if the config has none.
_TURNS = (('vision_tower', 20), ('^(?!.*vision_tower)', 20))
_EVALUATIONS = 10


@dataclasses.dataclass(frozen=True)
class Setting:
  """A row of the table: one run per seed.

  Attributes:
    tasks: names of the tasks.
    steps: steps of the run.
    sampling, balance: values for config.mixer.
    answers_share: share of vqa's training examples that keep their answers.
  """

  tasks: tuple[str, ...]
  steps: int
  sampling: str = 'joint'
  balance: str = 'fixed'
  answers_share: float = 1.0

  @property
  def together(self) -> bool:
    """Whether it trains several tasks."""
    return len(self.tasks) > 1

  @property
  def name(self) -> str:
    """Name of the row."""
    name = f'{self.sampling}, {self.balance}' if self.together else f'{self.tasks[0]} alone'
    return name if self.answers_share == 1 else f'{name}, {self.answers_share:.0%} of the answers'

  def folder(self, seed: int) -> str:
    """Folder of a run below the workdir, distinct for other tasks or steps."""
    parts = ['+'.join(self.tasks)]
    parts += [self.sampling, self.balance] if self.together else []
    parts += [] if self.answers_share == 1 else [f'answers_{self.answers_share:g}']
    return os.path.join('_'.join(parts), f'steps_{self.steps}', f'seed_{seed}')

  def config(self, base, seed: int):
    """The config of a run."""
    c = base.copy_and_resolve_references()
    weights = dict(zip(base.mixer.tasks, base.mixer.weights))
    c.mixer.tasks, c.mixer.weights = self.tasks, tuple(weights[task] for task in self.tasks)
    c.mixer.sampling, c.mixer.balance = self.sampling, self.balance
    c.mixer.turns = (base.mixer.turns or _TURNS) if self.sampling == 'alternating' else ()
    for task in set(base.mixer.tasks) - set(self.tasks):
      c.mixer.data[task] = configs.base().mixer.data[task]  # avoids a warning that it is not read
    if self.answers_share < 1:  # vqa then has a feed of its own
      c.mixer.data.vqa.answers_share = self.answers_share
    c.seed = seed
    c.train.steps = self.steps
    c.train.eval_every = -(-self.steps // _EVALUATIONS)
    c.train.checkpoint_every = -(-self.steps // 2)  # a stop loses at most half a run
    c.train.keep_checkpoints, c.train.samples = 1, 0
    c.optimizer.warmup_steps = min(base.optimizer.warmup_steps, self.steps // 10)
    return c

  def order(self, base) -> Sampling:
    """The sampling of the run with seed 0: the kind of every step."""
    config = self.config(base, 0)
    feeds = open_feeds(config, self.tasks, ('train',))
    return make_sampling(config, {task: len(feed.sources['train']) for task in self.tasks
                                  for feed in feeds if task in feed.tasks})


def main_settings(base, steps: int, samplings: Sequence[str],
                  balances: Sequence[str]) -> tuple[list[Setting], list[str]]:
  """The settings of the main table, and a note for each sampling that is left out."""
  tasks = tuple(base.mixer.tasks)
  settings = [Setting((task,), steps) for task in tasks if TASKS[task].make.main_score]
  if len(tasks) == 1:
    return settings, []
  settings.append(Setting(tasks, steps))
  notes, seen = [], {}
  for sampling in samplings:
    setting = Setting(tasks, steps, sampling=sampling)
    order = setting.order(base)
    if order in seen:
      notes.append(f'{sampling}: left out, its steps are those of {seen[order]}')
      continue
    seen[order] = sampling
    if sampling != 'joint':
      settings.append(setting)
    if any(kind.tasks != tasks for kind in order.kinds):
      settings.append(dataclasses.replace(setting, steps=len(tasks) * steps))
  settings += [Setting(tasks, steps, balance=name) for name in balances if name != 'fixed']
  return settings, notes


def label_settings(base, steps: int) -> list[Setting]:
  """The settings of --labels."""
  tasks = tuple(base.mixer.tasks)
  if 'vqa' not in tasks or len(tasks) == 1:
    raise UserError(f'--labels compares vqa alone with vqa beside other tasks, found {tasks}')
  return [Setting(of_run, steps, answers_share=share) for share in SHARES
          for of_run in (('vqa',), tasks)]
