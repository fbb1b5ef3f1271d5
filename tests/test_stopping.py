"""A stopped run skips nothing, and its exit code asks to resume."""

import json
import pathlib
import shutil

import pytest
import tiny

from xmodal import main
from xmodal.errors import UserError
from xmodal.mixer import unusable
from xmodal.train import run as runs
from xmodal.train import scoring
from xmodal.train.logs import metrics
from xmodal.train.plan import Plan
from xmodal.train.process.stop import Stop


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of the finished run as after a kill at step 3, before its evaluation."""
  workdir = pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))
  shutil.rmtree(workdir / 'checkpoints' / '6')
  (workdir / 'final.json').unlink()
  return workdir


def of_split(workdir, split, task):
  lines, _ = metrics.read(str(workdir / 'metrics.jsonl'))
  return {line.pop('step'): line for line in lines
          if (line['split'], line['task']) == (split, task)}


def test_an_evaluation_that_was_not_made_is_made_first(workdir, monkeypatch):
  c = tiny.changed(train__eval_every=3)
  places = []
  with monkeypatch.context() as patch:  # stopped after two of three batches
    patch.setattr(Stop, 'reached', lambda self: places.append(1) or len(places) == 2)
    assert tiny.train(workdir, c) == {}
  assert len(places) == 2 and not of_split(workdir, 'eval', 'vqa')
  expected = runs.evaluate_newest(Plan(c, str(workdir), 'eval'))  # the only checkpoint
  told = tiny.train(workdir, c)
  assert told['resumed_from'] == 3
  for task, scores in expected.items():
    evaluations = of_split(workdir, 'eval', task)
    assert list(evaluations) == [3, 6]
    assert evaluations[3] == {'split': 'eval', 'task': task, **scores}
    assert evaluations[6] == {'split': 'eval', 'task': task, **told['evaluation'][task]}
  assert list(of_split(workdir, 'train', 'all')) == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_fails_leaves_a_checkpoint_of_its_step(workdir, monkeypatch):
  c = tiny.changed(train__eval_every=4)

  def fail(*_):
    raise UserError('it does not fit')

  with monkeypatch.context() as patch:
    patch.setattr(scoring, 'predict_all', fail)
    with pytest.raises(UserError, match='does not fit'):
      tiny.train(workdir, c)
  assert tiny.train(workdir, c)['resumed_from'] == 4
  assert list(of_split(workdir, 'eval', 'vqa')) == [4, 6]


def test_what_was_left_out_before_is_told_at_the_end(workdir):
  (workdir / 'left_out.json').write_text(json.dumps(
      {'train': {'pictures': [[7, 'a.png: cut off']], 'boxes': [[9, ['record 9: outside']]]}}))
  told = tiny.train(workdir, tiny.changed(data__max_bad_share=0.0))  # pictures repaired
  assert told['unreadable_pictures'] == {'train': ['a.png: cut off'], 'eval': []}
  assert told['boxes_outside'] == {'train': ['record 9: outside'], 'eval': []}


@pytest.mark.parametrize('cut', ['', '{"train": {"pic', '[]', '{"train": {"pictures": [7]}}'])
def test_a_cut_list_of_what_was_left_out_is_no_obstacle(tmp_path, cut):
  path = tmp_path / 'left_out.json'
  path.write_text(cut)
  run = Plan(tiny.get_config(), str(tmp_path / 'run'))
  unusable.load(run.feeds, str(path))
  assert not run.feeds[0].bad['train'].reasons


def test_exit_codes_are_in_the_help():
  for code in ('0 ', '75', '130', '2 ', '1 '):
    assert f'\n  {code}' in main._help()
