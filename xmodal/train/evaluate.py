"""Evaluation that counts every example once, on any number of devices and hosts."""

import json
import os
import threading
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from xmodal.data.pipeline import BatchMaker, eval_batches
from xmodal.sharding import mesh as meshes
from xmodal.tasks.task import Task


def make_predict_step(model, mesh):
  """A compiled (variables, batch) -> (valid, {task: arrays}); results are whole on every host."""
  def predict_step(variables, batch):
    return batch['valid'], model.apply(variables, batch, method='predict')

  return jax.jit(meshes.over(mesh, predict_step), out_shardings=meshes.replicated(mesh))


def predict_all(predict_step, variables, make: BatchMaker, batch_size: int, mesh,
                stop: threading.Event | None = None):
  """Predictions of every record of a source.

  Args:
    predict_step: from make_predict_step.
    variables: the model's, as TrainState.variables gives them.
    make: of the source to evaluate.
    batch_size: over all devices; they divide it.
    mesh: the device mesh.
    stop: once set, no more batches are read.

  Returns:
    int64 [N], the records whose picture could be read, and {task: N predictions};
    None if stopped.
  """
  records, predictions = [], {name: [] for name in make.tasks}
  batches = eval_batches(make, batch_size, meshes.local_rows(mesh, batch_size))
  for number, batch in enumerate(batches):
    batch = meshes.put_batch(batch, mesh, batch_size)
    valid, outputs = jax.device_get(predict_step(variables, batch))
    records.append((number * batch_size + np.arange(batch_size))[valid])
    for name, task in make.tasks.items():
      decoded = task.decode(outputs[name])
      predictions[name] += [p for p, v in zip(decoded, valid) if v]
    if stop is not None and stop.is_set():
      return None
  return np.concatenate(records), predictions


def evaluate_source(predict_step, variables, make: BatchMaker, split: str, config, workdir: str,
                    mesh, step: int, stop: threading.Event | None = None
                    ) -> dict[str, dict] | None:
  """Scores the tasks of one source; writes predictions and sample pictures.

  Args:
    predict_step, variables, make, mesh, stop: see predict_all.
    split: what the source calls it.
    config: the whole config.
    workdir: of the run.
    step: that the variables are of.

  Returns:
    {task: scores}, or None if `stop` was set on the way.
  """
  predicted = predict_all(predict_step, variables, make, config.train.batch_size, mesh, stop)
  if predicted is None:
    return None
  records, predictions = predicted
  examples = [make.source[int(record)] for record in records]
  predictions = {name: task.relate(examples, predictions[name])
                 for name, task in make.tasks.items()}
  scores = score_all(make.tasks, examples, predictions)
  if jax.process_index() == 0:
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
  """One JSON object a line: record number, what was asked, what was answered, the truth."""
  lines = [json.dumps({'record': int(number), **line}, ensure_ascii=False) + '\n'
           for number, example, prediction in zip(records, examples, predictions)
           if (line := task.record(example, prediction)) is not None]
  if not lines:
    return
  with open(f'{path}.part', 'w', encoding='utf-8') as f:
    f.writelines(lines)
  os.replace(f'{path}.part', path)


def write_files(workdir: str, name: str, split: str, task: Task, examples, predictions) -> None:
  """What the task has for other programs: WORKDIR/{name}_{split}_{kind}.json."""
  for kind, content in task.files(examples, predictions).items():
    path = os.path.join(workdir, f'{name}_{split}_{kind}.json')
    with open(f'{path}.part', 'w', encoding='utf-8') as f:
      json.dump(content, f)
    os.replace(f'{path}.part', path)


def write_samples(path: str, task: Task, make: BatchMaker, records, examples, predictions,
                  count: int) -> None:
  """A sheet of up to `count` evenly chosen examples: what the model saw, said, and the truth."""
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
  sheet.save(path)
