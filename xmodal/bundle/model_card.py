"""The model card of a bundle, in Hugging Face's form, filled in from the run."""

from collections.abc import Mapping, Sequence
import json
import os
from typing import Any

import jax
import numpy as np

from xmodal import config as configs
from xmodal import storage
from xmodal.mixer.feed import task_config
from xmodal.predictor import Predictor

# The hub's names of tasks (https://huggingface.co/tasks); others have none.
_HUB_TASKS = {'vqa': 'visual-question-answering', 'detection': 'zero-shot-object-detection',
              'captioning': 'image-to-text', 'generation': 'text-to-image',
              'retrieval': 'zero-shot-image-classification'}
_DATA = ('source', 'name', 'train_split', 'eval_split', 'train_examples', 'eval_examples')
_OF_MADE = ('train_examples', 'eval_examples')  # of data that are drawn, not read
_ASKS = {'question': 'a picture and a question', 'picture': 'a picture',
         'names': 'a picture and names, or what means one thing ("the square left of the cross")',
         'texts': 'a picture and texts, or pictures and a text',
         'drawing': 'a text; a picture and a mask to change it'}


def card(predictor: Predictor, about: Mapping[str, Any], stored: Mapping[str, np.ndarray]
         ) -> str:
  """The text of MODEL_CARD.md.

  Args:
    predictor: the model; its run's final.json has the scores.
    about: the content of bundle.json.
    stored: its arrays by name.
  """
  config, name = predictor.config, os.path.basename(predictor.workdir)
  final = _final(predictor.workdir)
  same = final.get('step') == predictor.step
  scores = {task: _numbers(final['evaluation'][task]) for task in about['tasks']
            if same and task in final.get('evaluation', {})}
  data = {task: _data(task_config(config, task).data) for task in about['tasks']}
  measured = config.model.quantize or 'float32'
  parts = [
      _head(name, about, scores if measured == about['precision'] else {}, data), f'# {name}', '',
      f'A vision and language model with {_parameters(predictor):,} parameters. `model.py` in this '
      'folder answers with it; it needs the packages of `requirements.txt`.', '',
      '```python', 'from model import load', f'model = load({name!r})  # the path of this folder',
      f'model({_example(about)})', '```', '', '## Tasks', '',
      *_table(('task', 'input', 'answer', 'arrays'), [
          (task, _ASKS[one['query']['kind']], _answer(one), len(one['weights']))
          for task, one in about['tasks'].items()]),
      '', '## Training data', '',
      *_table(('task', *_DATA), [(task, *(facts.get(key, '') for key in _DATA))
                                 for task, facts in data.items()]),
      '', '## Scores', '', *_scores(scores, final, predictor.step, measured, about['precision']),
      '', '## Sizes', '',
      f'- {sum(array.nbytes for array in stored.values()) / 2**20:,.1f} MiB of weights, '
      f'{about["precision"]}',
      f'- pictures: {about["image_size"]}x{about["image_size"]} pixels',
      f'- programs: StableHLO for {", ".join(about["platforms"])}',
      '', '## Limits', '', *_limits(about, predictor),
      '', '## Intended use', '',
      'Pictures and texts like those of the training data above. Nothing was measured on others, '
      'nor how answers differ between groups of people.',
      '', '## How it was made', '',
      f'- {predictor.step} of {config.train.steps} steps of {config.train.batch_size} examples',
      *([f'- {final["device"]}, {final["seconds"]:,.0f} s'] if {'device', 'seconds'} <= final.keys()
        else []),
      f'- versions at export: {", ".join(f"{k} {v}" for k, v in about["versions"].items())}',
      '- keys of the config that differ from the defaults:', '',
      '```json', json.dumps(_changed(config), indent=1, ensure_ascii=False, default=str), '```', '']
  return '\n'.join(parts)


def _final(workdir):
  path = os.path.join(workdir, 'final.json')
  if not storage.exists(path):
    return {}
  try:
    found = json.loads(storage.read(path))
  except ValueError:  # cut by a crash
    return {}
  return found if isinstance(found, dict) else {}


def _is_main(key):
  """Whether a score is of all examples, and not of a group of them ('accuracy/color')."""
  return '/' not in key or 'recall_at' in key


def _numbers(scores):
  return {key: value for key, value in scores.items() if isinstance(value, (int, float))}


def _data(data):
  return {key: getattr(data, key) for key in _DATA
          if getattr(data, key) not in (None, '') and (key not in _OF_MADE or not data.root)}


def _parameters(predictor):
  return sum(leaf.size for leaf in jax.tree.leaves(predictor.variables.get('params', {})))


def _head(name, about, scores, data):
  """The card's YAML, of JSON values, which YAML reads."""
  known = [_HUB_TASKS[task] for task in about['tasks'] if task in _HUB_TASKS]
  results = [{'task': {'type': _HUB_TASKS.get(task, 'other'), 'name': task},
              'dataset': {'type': str(data[task].get('source', '')),
                          'name': str(data[task].get('source', '')),
                          'split': str(data[task].get('eval_split', ''))},
              'metrics': [{'type': key, 'value': value} for key, value in found.items()
                          if _is_main(key)]}
             for task, found in scores.items() if found]
  lines = ['library_name: jax', *([f'pipeline_tag: {known[0]}'] if known else []),
           f'tags: {json.dumps(["xmodal", "stablehlo", *about["tasks"]])}']
  if results:
    lines.append(f'model-index: {json.dumps([{"name": name, "results": results}])}')
  return '\n'.join(['---', *lines, '---', ''])


def _example(about):
  task, one = next(iter(about['tasks'].items()))
  arguments = {
      'question': "'a.jpg', 'what color is the square?'", 'picture': "'a.jpg'",
      'names': "'a.jpg', 'red circle. blue square.'",
      'texts': "'a.jpg', 'a red circle. a blue square.'", 'drawing': "None, 'a red circle'"}
  return f'{arguments[one["query"]["kind"]]}, task={task!r}'


def _answer(one):
  found = []
  for field in one['answer']:
    labels = f' ({len(field["labels"])} labels)' if 'labels' in field else ''
    found.append(field['kind'] + labels)
  return ', '.join(found)


def _scores(scores, final, step, measured, precision):
  if not final:
    return ['The run has no final evaluation.']
  if not scores:
    return [f'Not measured for this checkpoint, of step {step}; the last evaluation is of step '
            f'{final.get("step")}.']
  rows = [(task, key, f'{value:.4g}') for task, found in scores.items()
          for key, value in found.items() if _is_main(key)]
  here = '' if measured == precision else f' ({precision})'
  return [f'On the evaluation split, measured by the run after {step} steps with weights in '
          f'{measured}; not measured again on this folder{here}.', '',
          *_table(('task', 'metric', 'value'), rows)]


def _limits(about, predictor):
  lines = []
  for task, one in about['tasks'].items():
    query, labels = one['query'], [field['labels'] for field in one['answer'] if 'labels' in field]
    if labels and one['query']['kind'] == 'question':
      lines.append(f'- {task}: the classifier answers with one of {len(labels[0])} answers')
    elif labels:
      lines.append(f'- {task}: knows {len(labels[0])} names')
    if length := query.get('length'):
      lines.append(f'- {task}: reads {length} tokens of a text')
    if query['kind'] == 'names':
      lines.append(f'- {task}: trained on {len(query["known"])} names; a query may have others')
    if not one['keep_aspect']:
      lines.append(f'- {task}: pictures are stretched to a square')
  if predictor.config.data.source == 'shapes':
    lines.append('- the default training data are drawn scenes of coloured shapes, not photographs')
  return lines


def _changed(config):
  """The keys of the config that differ from the defaults; local paths by their last part."""
  default = dict(_leaves(configs.base(config.plugins)))
  found = {key: value for key, value in _leaves(config) if default.get(key, None) != value}
  return {key: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
          for key, value in found.items()}


def _leaves(section, prefix=''):
  for key, value in section.items():
    if hasattr(value, 'items'):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
  """A table in Markdown, without columns that are empty."""
  kept = [i for i in range(len(head)) if any(str(row[i]) for row in rows)]
  cells = [[str(row[i]).replace('|', r'\|') for i in kept] for row in (head, *rows)]
  lines = [f'| {" | ".join(row)} |' for row in cells]
  return [lines[0], f'|{"---|" * len(kept)}', *lines[1:]]
