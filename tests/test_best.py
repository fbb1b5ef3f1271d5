"""Several evaluations, the best checkpoint, and early stopping."""

import json
import os

import pytest
import single

from xmodal import config as configs
from xmodal.errors import UserError
from xmodal.tasks.objects import Objects
from xmodal.train import run as runs
from xmodal.train.checkpoints import checkpoint
from xmodal.train.plan import Plan


def config(**values):
  return single.changed(**{'train__checkpoint_every': 100, 'train__eval_every': 1,
                           'train__samples': 0, **values})


@pytest.fixture
def scored(monkeypatch):
  """Sets the scores of the next evaluations, in order."""
  numbers = []
  monkeypatch.setattr(Objects, 'score', lambda self, examples, _: {
      'f1': numbers.pop(0), 'examples': len(examples)})
  return numbers


def lines(workdir, split):
  read = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line for line in read if line['split'] == split}


def test_each_evaluation_has_its_own_split_cadence_and_size(tmp_path):
  c = config(train__steps=4, mixer__tasks=('vqa',))
  c.evaluations.held_out = configs.evaluation_of(split='test', every=2, examples=12, batch_size=4)
  plan = Plan(c, str(tmp_path / 'run'))
  assert plan.evaluations['held_out'].batch_size == 4
  final = runs.train(plan)
  assert final['evaluation']['vqa']['examples'] == 20
  assert final['evaluations']['held_out']['vqa']['examples'] == 12
  assert list(lines(tmp_path / 'run', 'eval')) == [1, 2, 3, 4]
  assert list(lines(tmp_path / 'run', 'held_out')) == [2, 4]
  predicted = (tmp_path / 'run' / 'predictions_vqa_held_out.jsonl').read_text().splitlines()
  assert len(predicted) == 12
  # Another evaluation interval is not another run.
  c.evaluations.held_out.every = 3
  Plan(c, str(tmp_path / 'run'))


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, scored, capsys):
  scored += [0.1, 0.5, 0.3, float('nan'), 0.4, 0.45]
  workdir = str(tmp_path / 'run')
  c = config(train__keep_best='objects', train__keep_checkpoints=1, train__checkpoint_every=2)
  assert runs.train(Plan(c, workdir))['step'] == 6
  assert sorted(checkpoint.saved_steps(workdir)) == [2, 6]
  assert checkpoint.find(workdir).endswith(os.path.join('checkpoints', '6'))
  assert checkpoint.find(os.path.join(workdir, 'best')).endswith(os.path.join('checkpoints', '2'))


def test_the_lowest_is_the_best_where_a_score_is_to_fall(tmp_path, scored):
  scored += [0.5, 0.2, 0.3]
  runs.train(Plan(config(train__keep_best='-objects/f1', train__steps=3), str(tmp_path / 'run')))
  assert json.loads((tmp_path / 'run' / 'best.json').read_text())['step'] == 2


def test_training_ends_when_nothing_gets_better_and_stays_ended(tmp_path, scored, capsys):
  scored += [0.1, 0.5, 0.3, 0.5]
  c = config(train__keep_best='eval/objects/f1', train__patience=2)
  assert runs.train(Plan(c, str(tmp_path / 'run')))['step'] == 4
  assert 'no better score for 2 evaluations' in capsys.readouterr().out
  assert sorted(checkpoint.saved_steps(str(tmp_path / 'run')))[-1] == 4
  scored += [0.7]
  assert runs.train(Plan(c, str(tmp_path / 'run')))['step'] == 4
  assert 'nothing left to train' in capsys.readouterr().out


@pytest.mark.parametrize('values, words', [
    ({'train__patience': 3}, 'train.patience=3 needs config.train.keep_best'),
    ({'train__keep_best': 'vqq/f1'}, "'vqq' is not one of the tasks objects")])
def test_what_cannot_be_the_best_is_one_line(tmp_path, values, words):
  with pytest.raises(UserError, match=words) as error:
    runs.train(Plan(config(**values), str(tmp_path / 'run')))
  assert '\n' not in str(error.value)


def test_a_score_that_there_is_not_is_told_with_those_there_are(tmp_path):
  with pytest.raises(UserError, match="no score 'f2'; it has .*f1"):
    runs.train(Plan(config(train__keep_best='objects/f2'), str(tmp_path / 'run')))


def test_an_evaluation_that_cannot_be_is_one_line(tmp_path):
  c = config()
  c.evaluations.train = configs.evaluation_of()
  with pytest.raises(UserError, match='evaluations.train: the name is taken'):
    Plan(c, 'unused')
  c = config()
  c.evaluations.other = configs.evaluation_of(batch_size=-1)
  with pytest.raises(UserError, match='evaluations.other.batch_size=-1: wanted 0 or more'):
    Plan(c, 'unused')
