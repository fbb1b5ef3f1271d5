"""One evaluation of a run: a split, the tasks scored on it, and its period in steps."""

from collections.abc import Callable, Mapping, Sequence
import itertools

import jax
import numpy as np

from xmodal.data import pipeline
from xmodal.data.overview import overview_of
from xmodal.data.pictures.cache import KeepDecoded
from xmodal.errors import UserError
from xmodal.mixer.feed import Feed, open_feeds
from xmodal.options import Option
from xmodal.sharding import mesh as meshes
from xmodal.tasks.task import Task
from xmodal.train import scoring
from xmodal.train.process.stop import Stop

# The evaluation of config.data.eval_split, every config.train.eval_every steps.
DEFAULT = 'eval'
_LOOKED_AT = 100  # examples
# Options of config.evaluations.NAME, which adds further evaluations.
OPTIONS = {
    'split': Option('', "Name of the split in the source; '': config.data.eval_split.",
                    may_change=True),
    'every': Option(0, 'Steps between evaluations; 0: config.train.eval_every.', low=0,
                    may_change=True),
    'examples': Option(0, 'Number of examples, the first of the split; 0: all.', low=0,
                       may_change=True),
    'batch_size': Option(0, 'Batch size; 0: config.train.eval_batch_size.',
                         low=0, may_change=True)}


class Evaluation:
  """A split, the tasks scored on it, and its period in steps.

  Attributes:
    name: used in file names, and as 'split' in metrics.jsonl.
    feeds: the sources.
    tasks: by name, with the vocabulary of the split.
    scored: names of the tasks for which the split has targets.
    batch_size: examples predicted at once, over all devices.
    predict_step: see scoring.make_predict_step.
    readers: processes that make its batches, see process.readers; None: threads make them.
  """

  def __init__(self, name: str, own, config, feeds: Sequence[Feed], tasks: Mapping[str, Task],
               samples: Mapping[str, Sequence], make_model: Callable, mesh, decode: KeepDecoded):
    """
    Args:
      name: name of the evaluation.
      own: config.evaluations[name]; None for the default evaluation.
      config: the whole config, with the data section of this evaluation.
      feeds: its sources.
      tasks: the tasks of training, by name.
      samples: some examples by task.
      make_model: maps tasks to the model that predicts for them.
      mesh: the device mesh.
      decode: turns picture files into pixels.

    Raises:
      UserError: batch_size does not divide over the devices.
    """
    self.name, self.feeds, self._config, self._mesh = name, feeds, config, mesh
    self.readers = None
    self._decode, self._most = decode, own.examples if own else 0
    self.tasks = {task: tasks[task].for_split(samples[task]) for task in tasks}
    self.scored = [task for task in tasks if _has_targets(samples[task], tasks[task].needs)]
    self._every = own.every if own and own.every else config.train.eval_every
    where, size = ((f'config.evaluations.{name}.batch_size', own.batch_size)
                   if own and own.batch_size else
                   ('config.train.eval_batch_size', config.train.eval_batch_size))
    scoring.check_batch_size(where, size, mesh)
    self.batch_size = size or scoring.choose_batch_size(config, self.tasks, mesh)
    self.predict_step = scoring.make_predict_step(make_model(self.tasks), mesh)

  def is_due(self, step: int) -> bool:
    """Whether this evaluation runs after a step."""
    return step == self._config.train.steps or step % self._every == 0

  def maker(self, feed: Feed | None = None) -> pipeline.BatchMaker:
    """Makes batches of a feed; None: the first."""
    return (feed or self.feeds[0]).maker('eval', self.tasks, self._decode, self.name, self.readers)

  def compile(self, feed: Feed, abstract_variables):
    """Compiles the predict step for a feed: (variables, batch) -> predictions."""
    filler = self.maker(feed)(np.array([-1]), np.array([0]))
    sharding = meshes.batch_sharding(self._mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        (self.batch_size, *x.shape[1:]), x.dtype, sharding=sharding), filler)
    return self.predict_step.lower(abstract_variables, batch).compile()

  def run(self, variables, step: int, workdir: str, stop: Stop | None = None
          ) -> dict[str, dict] | None:
    """Scores the split; writes predictions and sample pictures into the workdir.

    Returns {task: scores}; None if stopped.
    """
    scores = {}
    for feed in self.feeds:
      name = feed.split('eval') if self.name == DEFAULT else self.name
      of_feed = scoring.evaluate_source(
          self.predict_step, variables, self.maker(feed), name, self._config, workdir, self._mesh,
          self.batch_size, step, stop, self._most)
      if of_feed is None:
        return None
      scores |= of_feed
    return scores

  def table(self, scores: Mapping[str, Mapping]) -> str:
    """The scores of all tasks, for the terminal."""
    found = {name: task.table(scores[name]) or task.headline(scores[name])
             for name, task in self.tasks.items() if scores[name]}
    return '\n\n'.join(f'{name}\n{text}' if len(self.tasks) > 1 else text
                       for name, text in found.items() if text)

  def headlines(self, scores: Mapping[str, Mapping], step: int) -> list[str]:
    """A line of main scores for each task that has one."""
    where = 'evaluation' if self.name == DEFAULT else f'evaluation {self.name!r}'
    return [f'{where} at step {step}: {name} {line}' for name, of_task in scores.items()
            if (line := self.tasks[name].headline(of_task))]


def _has_targets(examples, needs):
  # The examples of a pack may be millions that are read from disk; its overview counts them.
  return any(example.has(*needs) for example in itertools.islice(examples, _LOOKED_AT)) or bool(
      overview_of(examples).count(*needs))


def open_named(config, names: tuple[str, ...]) -> dict[str, tuple]:
  """Opens config.evaluations: {name: (its section, the config with its data, feeds)}.

  Raises:
    UserError: a split does not exist.
  """
  found = {}
  for name, own in config.evaluations.items():
    if name in (DEFAULT, 'train'):
      raise UserError(f'config.evaluations.{name}: the name is taken; give it another')
    with_split = config.copy_and_resolve_references()
    if own.split:
      with_split.data.eval_split = own.split
      for task in with_split.mixer.data:
        with_split.mixer.data[task].eval_split = own.split
    if own.examples:
      with_split.data.eval_examples = own.examples
    found[name] = own, with_split, open_feeds(with_split, names, ('eval',))
  return found
