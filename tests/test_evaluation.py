"""The evaluation batch size: fits in memory if training does, and does not change results."""

import json
import pathlib
import shutil

import pytest
import tiny

from xmodal.errors import UserError
from xmodal.sharding import mesh as meshes
from xmodal.train import run as runs
from xmodal.train import scoring
from xmodal.train.plan import Plan


@pytest.mark.parametrize('size', [3, 32])
def test_results_do_not_depend_on_the_batch(finished, tmp_path, size):
  workdir = pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))
  plan = Plan(tiny.changed(train__eval_batch_size=size), str(workdir), 'eval')
  scores = runs.evaluate_newest(plan)
  assert scores == json.loads((finished / 'final.json').read_text())['evaluation']
  lines, expected = ([json.loads(line) for line in
                      (folder / 'predictions_vqa_val.jsonl').read_text().splitlines()]
                     for folder in (workdir, finished))
  assert ([line.pop('probability') for line in lines]
          == pytest.approx([line.pop('probability') for line in expected], abs=1e-5))
  assert lines == expected and len(lines) == 20


@pytest.mark.parametrize('values, expected', [
    ({}, 8), ({'train__accumulation': 4}, 2), ({'vqa__beams': 3}, 2), ({'vqa__beams': 9}, 1),
    ({'vqa__beams': 3, 'vqa__generation_weight': 0.0}, 8), ({'train__eval_batch_size': 5}, 5),
    ({'mixer__tasks': ('generation', 'captioning')}, 4),
    ({'mixer__tasks': ('generation', 'captioning'), 'generation__guidance': 1.0}, 8),
    ({'mixer__tasks': ('generation', 'captioning'), 'captioning__beams': 4}, 2),
    ({'mixer__tasks': ('regression',), 'mixer__weights': (1.0,), 'data__numbers': True,
      'regression__beams': 2}, 4),
], ids=str)
def test_what_multiplies_an_example_divides_the_batch(tmp_path, values, expected):
  assert Plan(tiny.changed(**values), str(tmp_path / 'run')).evaluation.batch_size == expected


def test_captions_of_a_picture_and_more_names_divide_it_too(tmp_path):
  run = Plan(tiny.changed(mixer__tasks=('retrieval', 'detection')), str(tmp_path / 'run'))
  size = lambda: scoring.choose_batch_size(run.config, run.evaluation.tasks, run.mesh)
  captions = run.evaluation.tasks['retrieval'].copies
  assert captions == max(len(run.feeds[0].sources['eval'][i].captions) for i in range(20))
  assert size() == 8 // captions
  assert run.tasks['detection'].copies == 1
  run.evaluation.tasks['detection'].category_ids = dict.fromkeys(
      range(9 * len(run.tasks['detection'].names)))
  assert size() == 1


def test_the_batch_divides_over_the_devices():
  mesh = meshes.make_mesh(1, 1, 1)

  class Four:
    shape = {**mesh.shape, 'data': 2, 'fsdp': 2}

  config, tasks = tiny.changed(train__batch_size=24, vqa__beams=3), {}
  for copies, expected in ((1, 24), (2, 12), (5, 4), (99, 4)):
    tasks['vqa'] = type('Of', (), {'copies': copies})()
    assert scoring.choose_batch_size(config, tasks, Four) == expected
  with pytest.raises(UserError, match='eval_batch_size=6 .* 4 devices .* multiple of 4'):
    scoring.check_batch_size('config.train.eval_batch_size', 6, Four)
