"""Data feeds: one source of examples each, shared by the tasks that read it.

Tasks with the same data share one source and one stream of pictures, so that the
towers encode each picture once for all of them. A batch of one feed is flat: {'image', 'valid',
name of another sense: its arrays, task name: features}. A batch of several feeds is
{feed name: flat batch}.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import re

from ml_collections import ConfigDict
import numpy as np

from xmodal.data import pipeline
from xmodal.data.example import Source
from xmodal.data.faults import fault_notes
from xmodal.data.made import made_notes
from xmodal.data.open import OF_THE_RUN, check_flags, open_source
from xmodal.data.open import OPTIONS as DATA_OPTIONS
from xmodal.data.pictures import augmentation
from xmodal.data.pictures.augmentation import Augmentation, language_notes
from xmodal.data.pictures.box_checks import BadBoxes, size_notes
from xmodal.data.pictures.images import Decoded
from xmodal.data.sources.source import SOURCES
from xmodal.data.workers import Workers
from xmodal.errors import UserError
from xmodal.mixer.sampling.sampling import Sampling
from xmodal.options import Option
from xmodal.sharding import hosts
from xmodal.tasks.task import TASKS, Task, senses_of

_SAMPLED = 500  # examples of a generated source from which its language is detected
_MOST_BOXES = 20  # maximum number of listed boxes that are not inside their pictures

OPTIONS = {
    'tasks': Option(('vqa',), 'Names of the tasks.'),
    'weights': Option((1.0,), "Weight of each task's loss; see "
                      'xmodal/mixer/balance/balance.py.')}


def task_config(config: ConfigDict, task: str) -> ConfigDict:
  """The config of one task: config.data, overridden by config.mixer.data.TASK.

  Raises:
    UserError: a key is unknown, or a value is invalid.
  """
  own = config.copy_and_resolve_references()
  _override(own.data, config.mixer.data.get(task) or {}, f'config.mixer.data.{task}')
  return own


def _override(data, changes, where):
  for key, value in changes.items():
    if key not in data or key in OF_THE_RUN:
      raise UserError(f'{where}.{key}: wanted one of '
                      f'{", ".join(k for k in data if k not in OF_THE_RUN)}')
    if isinstance(data[key], ConfigDict):
      _override(data[key], value or {}, f'{where}.{key}')
    elif value is not None:
      try:
        data[key] = value
      except (TypeError, ValueError) as error:
        raise UserError(f'{where}.{key}={value!r}: wanted {type(data[key]).__name__}') from error


@dataclasses.dataclass
class Feed:
  """One source of examples, and the tasks that read it.

  Attributes:
    name: the task names in words, such as 'vqa and objects'.
    tasks: the task names.
    config: the whole config, with the data section of these tasks.
    sources: one per use, 'train' and 'eval' (or only 'eval').
    bad: pictures that cannot be read, by use.
    bad_boxes: boxes that are not inside their pictures, by use.
  """

  name: str
  tasks: tuple[str, ...]
  config: ConfigDict
  sources: dict[str, Source]
  bad: dict[str, pipeline.BadPictures]
  bad_boxes: dict[str, BadBoxes]

  def split(self, use: str) -> str:
    """Name in the source of the split for a use."""
    return self.config.data[f'{use}_split']

  def notes(self, use: str) -> list[str]:
    """Notes on a split: its share of generated examples, faults in its files, and examples without
    augmentation."""
    source, flags = self.sources[use], check_flags(self.config, self.split(use))
    notes = [*made_notes(use, source), *fault_notes(use, source, flags),
             *size_notes(source, use, flags)]
    if use == 'train':
      augmentation = Augmentation(**self.config.data.augment.to_dict())
      notes += language_notes(augmentation, pipeline.sample(source, _SAMPLED))
    return notes

  def maker(self, use: str, tasks: Mapping[str, Task], decode: Callable[..., Decoded],
            name: str = '', workers: Workers | None = None) -> pipeline.BatchMaker:
    """Makes flat batches of a use, for those of `tasks` that read this feed.

    decode, name, workers: see pipeline.BatchMaker; the feed's name is added to `name`.
    """
    data = self.config.data
    return pipeline.BatchMaker(
        self.sources[use], {name: tasks[name] for name in self.tasks},
        (data.image_size, data.image_size), self.bad[use],
        Augmentation(**data.augment.to_dict()) if use == 'train' else None, data.blank,
        self.config.seed, decode, data.keep_aspect, self.bad_boxes[use],
        senses=senses_of({name: tasks[name] for name in self.tasks}), name=f'{name}/{self.name}',
        workers=workers, root=data.root)


def open_feeds(config: ConfigDict, tasks: tuple[str, ...], uses: tuple[str, ...]) -> list[Feed]:
  """Opens the feeds of tasks, each source once.

  Raises:
    UserError: config.mixer.data is invalid, or a source cannot be used.
  """
  if unknown := [task for task, changes in config.mixer.data.items()
                 if task not in config and changes]:
    raise UserError(f'config.mixer.data.{unknown[0]}: no such task; config.mixer.tasks={tasks}')
  shared = {}
  for task in tasks:
    own = task_config(config, task)
    shared.setdefault(own.data.to_json(sort_keys=True), (own, []))[1].append(task)
  return [_open(own, tuple(names), uses) for own, names in shared.values()]


def unread(config: ConfigDict, tasks: tuple[str, ...]) -> Iterator[str]:
  """Yields a line for each section of config.mixer.data whose task the run does not train."""
  for task, changes in config.mixer.data.items():
    if task not in tasks and _has_values(changes):
      yield f'config.mixer.data.{task} is not read: {task} is none of config.mixer.tasks'


_OF_A_TASK = re.compile(rf'config\.data\.(?!{"|".join(OF_THE_RUN)})')


def _has_values(changes):
  return any(_has_values(value) if isinstance(value, ConfigDict) else value is not None
             for value in (changes or {}).values())


def _check_data(config):
  """Checks the ranges of the data options, which tasks may override."""
  for section, options in ((config.data, DATA_OPTIONS | SOURCES.options()),
                           (config.data.augment, augmentation.OPTIONS)):
    where = 'config.data' if section is config.data else 'config.data.augment'
    for key, option in options.items():
      option.check(f'{where}.{key}', section[key])


def _open(config, names, uses):
  name = ' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))
  try:
    _check_data(config)
    sources = {use: open_source(config, config.data[f'{use}_split'], train=use == 'train',
                                only_answered=all('answers' in TASKS[n].make.needs for n in names))
               for use in uses}
  except UserError as error:
    text = str(error)
    if any(_has_values(config.mixer.data[task]) for task in names):
      # Name the keys that set these values.
      text = _OF_A_TASK.sub(f'config.mixer.data.{names[0]}.', text)
    raise UserError(f'data of {name}: {text}') from error
  return Feed(name, names, config, sources,
              {use: pipeline.BadPictures(
                  len(source), config.data.max_bad_share,
                  hosts.GlobalCounter(f'{name}/{use}').add if hosts.several() else None)
               for use, source in sources.items()},
              {use: BadBoxes() for use in uses})


def each_split(feeds: Sequence[Feed]) -> Iterator[tuple[str, Feed, str]]:
  """Yields (label, feed, use) of each split that the feeds read."""
  for feed in feeds:
    for use in feed.sources:
      yield use if len(feeds) == 1 else f'{use} data of {feed.name}', feed, use


def data_notes(feeds: Sequence[Feed]) -> list[str]:
  """Lines on pictures that could not be read, and on boxes outside their pictures."""
  lines = [line for name, feed, use in each_split(feeds) if (bad := feed.bad[use]).reasons
           for line in (
               f'{name}: {len(bad.reasons)} of {len(feed.sources[use])} examples were skipped: '
               'their pictures cannot be read:', *(f'  {reason}' for reason in bad.lines()))]
  for name, feed, use in each_split(feeds):
    if sizes := sorted(feed.bad_boxes[use].of_size.values()):
      lines.append(f'{name}: {len(sizes)} pictures differ in size from the size stated with their '
                   'boxes:')
      lines += _first(sizes)
    if boxes := feed.bad_boxes[use].box_lines():
      lines.append(f'{name}: {len(boxes)} boxes in {len(feed.bad_boxes[use].of_record)} of '
                   f'{len(feed.sources[use])} examples are not inside their pictures; they were '
                   'clipped, or dropped if entirely outside:')
      lines += _first(boxes)
  return lines


def _first(lines):
  more = [f'  and {len(lines) - _MOST_BOXES} more'] if len(lines) > _MOST_BOXES else []
  return [*(f'  {line}' for line in lines[:_MOST_BOXES]), *more]


class BatchStream:
  """The batches of a run. A step's batch holds its tasks' examples from all their feeds."""

  def __init__(self, makers: Mapping[str, pipeline.BatchMaker]):
    """makers: batch maker of each feed, by feed name."""
    self._makers = dict(makers)

  def batch(self, tasks: tuple[str, ...], records: Callable[[pipeline.BatchMaker], tuple]) -> dict:
    """One batch of some tasks; `records` maps a maker to (records, positions)."""
    job = self._job(tasks, records)
    return self._joined(tasks, [part.make(part.records, part.positions) for part in job])

  def _job(self, tasks, records):
    return [pipeline.BatchRequest(make.with_tasks(chosen), *records(make))
            for make in self._makers.values()
            if (chosen := [task for task in make.tasks if task in tasks])]

  def _joined(self, tasks, batches):
    if len(self._makers) == 1:
      return batches[0]
    names = (name for name, make in self._makers.items() if not make.tasks.keys().isdisjoint(tasks))
    return dict(zip(names, batches, strict=True))

  def filler(self, tasks: tuple[str, ...]) -> dict:
    """A batch of one padding example, used for shapes."""
    return self.batch(tasks, lambda make: (np.array([-1]), np.array([0])))

  def at(self, tasks: tuple[str, ...], sampling: Sampling, step: int, batch_size: int,
         rows: np.ndarray | None = None) -> dict:
    """This host's rows (None: all) of the batch of some tasks at a step.

    A feed advances only in steps that read it, so each of its examples occurs once
    per epoch of the feed.
    """
    return self.batch(tasks, self._records_at(sampling, step, batch_size, rows))

  def _records_at(self, sampling, step, batch_size, rows):
    return lambda make: pipeline.train_records(
        make, batch_size, sampling.count_steps(make.tasks, step), rows)

  def batches(self, sampling: Sampling, batch_size: int, start: int, stop: int,
              rows: np.ndarray | None = None) -> Iterator[dict]:
    """This host's rows of the batches of steps start..stop-1, prefetched."""
    def tasks(step):
      return sampling.kinds[sampling.kind(step)].tasks

    jobs = (self._job(tasks(step), self._records_at(sampling, step, batch_size, rows))
            for step in range(start, stop))
    for step, batches in enumerate(pipeline.ahead(jobs), start):
      yield self._joined(tasks(step), batches)


def parts(batch: Mapping) -> tuple[Mapping, ...]:
  """The flat batches in a batch."""
  return (batch,) if 'valid' in batch else tuple(batch.values())
