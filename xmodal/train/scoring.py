"""Evaluation that counts every example once, on any number of devices and hosts."""

from collections.abc import Mapping, Sequence
import os

import jax
import numpy as np
from PIL import Image

from xmodal import atomic, strict_json
from xmodal.data.pipeline import BatchMaker, eval_batches
from xmodal.errors import UserError
from xmodal.options import Option
from xmodal.sharding import mesh as meshes
from xmodal.tasks.task import Task
from xmodal.train.process import together
from xmodal.train.process.stop import Stop
from xmodal.train.steps.read import as_read

OPTIONS = {
    'eval_every': Option(500, 'Steps between evaluations.', low=1, may_change=True),
    'eval_batch_size': Option(0, 'Batch size of evaluation; 0: that of a micro-batch, divided by '
                              'the number of beams, captions or guidance passes per example.',
                              low=0, may_change=True),
    'samples': Option(12, 'Number of predictions drawn at each evaluation.', low=0,
                      may_change=True)}


def make_predict_step(model, mesh):
  """A jitted (variables, batch) -> (valid, {task: arrays}), over the mesh as the batch is."""
  def predict_step(variables, batch):
    variables = {**variables, 'params': as_read(model, variables['params'])}
    return batch['valid'], model.apply(variables, batch, method='predict')

  return jax.jit(meshes.over(mesh, predict_step), out_shardings=meshes.batch_sharding(mesh))


def check_batch_size(key: str, size: int, mesh) -> None:
  """Raises UserError if an evaluation batch does not divide over the devices.

  key: config key of the size, for the message.
  """
  ways = meshes.batch_ways(mesh)
  if size % ways:
    raise UserError(f'{key}={size} does not divide over {ways} devices (mesh data x fsdp); wanted '
                    f'a multiple of {ways}, or 0 for an automatic choice')


def choose_batch_size(config, tasks: Mapping[str, Task], mesh) -> int:
  """Batch size of evaluation, over all devices.

  The size of a training micro-batch, divided by the largest Task.copies. A training step needs more
  memory per example than a prediction, so what fits there fits here. It is a multiple of the
  number of devices; results do not depend on it.
  """
  ways = meshes.batch_ways(mesh)
  fits = config.train.batch_size // max(1, config.train.accumulation) // max(
      task.copies for task in tasks.values())
  return max(fits // ways, 1) * ways


def predict_all(predict_step, variables, make: BatchMaker, batch_size: int, mesh,
                stop: Stop | None = None, most: int = 0):
  """Predicts the records of a source whose rows of batches this process holds.

  Processes may hold the same rows, see sharding.mesh.local_rows.

  Args:
    predict_step: from make_predict_step.
    variables: model variables, see TrainState.variables.
    make: batch maker of the source.
    batch_size: over all devices; a multiple of their number.
    mesh: the device mesh.
    stop: checked after each batch.
    most: number of records, from the first on; 0: all.

  Returns:
    (int64 [N] records whose pictures could be read, {task: N predictions}); None if stopped.
  """
  records, predictions = [], {name: [] for name in make.tasks}
  rows = meshes.local_rows(mesh, batch_size)
  batches = eval_batches(make, batch_size, rows, most)
  computed = (predict_step(variables, meshes.put_batch(batch, mesh, batch_size))
              for batch in batches)
  for number, (valid, outputs) in enumerate(_one_ahead(computed, batch_size)):
    records.append((number * batch_size + rows)[valid])
    for name, task in make.tasks.items():
      decoded = task.decode(outputs[name])
      predictions[name] += [p for p, v in zip(decoded, valid) if v]
    if stop is not None and stop.reached():
      return None
  return np.concatenate(records), predictions


def _one_ahead(outputs, batch_size):
  """Yields outputs as numpy arrays; the devices compute the next ones meanwhile."""
  try:
    last = next(outputs, None)
    while last is not None:
      following = next(outputs, None)
      yield meshes.get_batch(last)
      last = following
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(
        f'evaluating {batch_size} examples at once needs more memory than the device has: lower '
        'config.train.eval_batch_size and run the same command to resume') from error


def evaluate_source(predict_step, variables, make: BatchMaker, split: str, config, workdir: str,
                    mesh, batch_size: int, step: int, stop: Stop | None = None, most: int = 0
                    ) -> dict[str, dict] | None:
  """Scores the tasks of one source; writes predictions and sample pictures.

  Each process decodes the predictions of its rows; process 0 scores and writes them all.

  Args:
    predict_step, variables, make, batch_size, mesh, stop, most: see predict_all.
    split: name of the split, used in file names.
    config: the whole config.
    workdir: folder of the run.
    step: training step of the variables.

  Returns:
    {task: scores}; None if stopped.
  """
  predicted = predict_all(predict_step, variables, make, batch_size, mesh, stop, most)
  if predicted is None:
    return None
  everywhere = together.to_lead(predicted)
  return together.result_of_lead(lambda: _finish(
      *_joined(everywhere), make, split, config, workdir, step))


def _joined(parts):
  """The (records, predictions) of all processes as one, each record once and in order."""
  records, places = np.unique(np.concatenate([records for records, _ in parts]),
                              return_index=True)
  predictions = {}
  for name in parts[0][1]:
    every = [prediction for _, by_task in parts for prediction in by_task[name]]
    predictions[name] = [every[place] for place in places]
  return records, predictions


def _finish(records, predictions, make, split, config, workdir, step):
  """Scores predictions; writes them and sample pictures. Returns {task: scores}."""
  examples = [make.source[int(record)] for record in records]
  predictions = {name: task.relate(examples, predictions[name])
                 for name, task in make.tasks.items()}
  scores = score_all(make.tasks, examples, predictions)
  for name, task in make.tasks.items():
    write_predictions(os.path.join(workdir, f'predictions_{name}_{split}.jsonl'), task, records,
                      examples, predictions[name])
    write_files(workdir, name, split, task, examples, predictions[name])
    write_samples(os.path.join(workdir, 'samples', f'{name}_{split}_{step:07d}.png'), task, make,
                  records, examples, predictions[name], config.train.samples)
  return scores


def score_all(tasks: Mapping[str, Task], examples: Sequence, predictions: Mapping
              ) -> dict[str, dict]:
  """Each task's official metrics: {task: {metric: number}}."""
  return {name: task.score(examples, predictions[name]) for name, task in tasks.items()}


def write_predictions(path: str, task: Task, records, examples, predictions) -> None:
  """Writes a JSON object per line: record number, input, prediction and target."""
  lines = [strict_json.dumps({'record': int(number), **line}, ensure_ascii=False) + '\n'
           for number, example, prediction in zip(records, examples, predictions)
           if (line := task.record(example, prediction)) is not None]
  if not lines:
    return
  with atomic.written(path) as f:
    f.writelines(lines)


def write_files(workdir: str, name: str, split: str, task: Task, examples, predictions) -> None:
  """Writes the task's files for other programs: WORKDIR/{name}_{split}_{kind}.json."""
  for kind, content in task.files(examples, predictions).items():
    path = os.path.join(workdir, f'{name}_{split}_{kind}.json')
    with atomic.written(path) as f:
      f.write(strict_json.dumps(content))


def write_samples(path: str, task: Task, make: BatchMaker, records, examples, predictions,
                  count: int) -> None:
  """Draws up to `count` evenly spaced examples: input, prediction and target."""
  chosen = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).astype(int))
  cards = []
  for i in chosen:
    pixels = make(np.array([records[i]]), np.array([0]))['image'][0]
    card = task.draw(examples[i], pixels, predictions[i])
    if card is not None:
      cards.append(card)
  if not cards:
    return
  columns = min(4, len(cards))
  width, height = (max(getattr(card, side) for card in cards) for side in ('width', 'height'))
  sheet = Image.new('RGB', (columns * width, -(-len(cards) // columns) * height), 'white')
  for number, card in enumerate(cards):
    sheet.paste(card, ((number % columns) * width, (number // columns) * height))
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with atomic.written(path, 'wb') as f:
    sheet.save(f, 'PNG')
