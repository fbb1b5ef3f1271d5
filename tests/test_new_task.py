"""The plugin task in xmodal/tasks/README.md: its code block is trained and queried."""

import json
import pathlib
import re
import sys

import pytest
import tiny

from xmodal import config as configs
from xmodal import predict
from xmodal.tasks.task import TASKS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def counting(tmp_path, monkeypatch):
  """Writes the code block to a module in another folder; returns its name."""
  text = (ROOT / 'xmodal' / 'tasks' / 'README.md').read_text(encoding='utf-8')
  (block,) = re.findall(r'```python\n(.*?)```', text.split('## Adding a task')[1].split('\n## ')[0],
                        re.DOTALL)
  assert len(block.splitlines()) < 60
  (tmp_path / 'my_counting.py').write_text(block)
  monkeypatch.syspath_prepend(str(tmp_path))
  yield 'my_counting'
  sys.modules.pop('my_counting', None)
  TASKS._parts.pop('counting', None)


def test_the_task_of_the_guide_learns_beside_others_and_is_queried(counting, tmp_path, capsys):
  configs.load_plugins((counting,))
  final = tiny.train(tmp_path / 'run', tiny.changed(
      plugins=(counting,), counting__most=10, mixer__tasks=('objects', 'counting'),
      mixer__weights=(1.0, 1.0), train__steps=160, train__eval_every=160,
      train__checkpoint_every=160, optimizer__learning_rate=3e-3))
  scores = final['evaluation']['counting']
  assert scores['examples'] == 20 and scores['accuracy'] > 0.3  # 6 show 4, the most frequent
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').open()]
  losses = [line['loss'] for line in lines if line['task'] == 'counting' and 'loss' in line]
  assert losses[0] > 2 and sum(losses[-5:]) / 5 < 1.7  # eleven classes, of which few occur
  capsys.readouterr()
  assert predict.main(['--checkpoint', str(tmp_path / 'run'), '--task', 'counting', '--image',
                       str(ROOT / 'notebooks' / 'pictures' / 'scene.png')]) == 0
  assert 1 <= int(capsys.readouterr().out.strip().splitlines()[-1]) <= 4
