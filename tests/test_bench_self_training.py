"""bench.self_training: one command trains, labels, trains again and prints a table."""

import json
import os
import shutil
import signal

import jax
from PIL import Image
import pytest

from xmodal import main
from xmodal.bench import self_training
from xmodal.data.scenes.shapes import Shapes

CONFIG = '''
import tiny

def get_config():
  c = tiny.get_config()
  c.mixer.tasks, c.mixer.weights = ('vqa', 'captioning'), (1.0, 1.0)
  c.captioning.caption_length = 8
  return c
'''


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
  """Runs the benchmark in this process: (exit code, stdout, stderr)."""
  monkeypatch.setattr(main, 'use_two_cores', lambda config: jax.devices())
  (tmp_path / 'small.py').write_text(CONFIG)

  def run(*args):
    handler = signal.getsignal(signal.SIGTERM)
    try:
      code = self_training.main(['--config', str(tmp_path / 'small.py'), '--workdir',
                                 str(tmp_path / 'runs'), *args])
    finally:
      signal.signal(signal.SIGTERM, handler)
    return code, *capsys.readouterr()

  return run


COMMAND = ('--labelled', '16', '--unlabelled', '8', '--steps', '2', '--seeds', '1', '--per_picture',
           '2', '--threshold', '0')


def test_a_model_trains_on_what_another_said(bench, tmp_path, monkeypatch):
  whole = self_training.train

  def train(config, workdir):  # skips runs that no other run needs
    if os.path.basename(workdir) in ('labelled', 'made_too'):
      return whole(config, workdir)
    return shutil.copytree(tmp_path / 'runs' / 'seed_0' / 'labelled', workdir, dirs_exist_ok=True)

  monkeypatch.setattr(self_training, 'train', train)
  code, out, _ = bench(*COMMAND)
  assert code == 0
  rows = [line.split(' | ')[0].strip('| ') for line in out.splitlines() if line.startswith('| ')]
  assert rows == ['trained on', '---', 'labelled', 'labelled, for longer', 'made too',
                  'all labelled']
  found = json.loads((tmp_path / 'runs' / 'results.json').read_text())
  with open(tmp_path / 'runs' / 'seed_0' / 'made_too' / 'final.json', encoding='utf-8') as f:
    assert found['made too']['vqa'] == [json.load(f)['evaluation']['vqa']['accuracy']]

  # The pseudo-labelled scenes are those whose true labels only the last row has.
  made = tmp_path / 'runs' / 'seed_0' / 'made_2_0'
  lines = [json.loads(line) for line in (made / 'train.jsonl').read_text().splitlines()]
  names = sorted({os.path.basename(line['image']) for line in lines})
  assert names == [f'{number:06}.png' for number in range(16, 24)]
  source = Shapes('train', size=24, image_size=32)
  with Image.open(made / lines[0]['image']) as image:
    number = int(os.path.basename(lines[0]['image']).split('.')[0])
    assert image.tobytes() == source[number].image.tobytes()
  known = {source[number].question for number in range(16)}
  assert {line['question'] for line in lines if 'question' in line} <= known

  # A second time there is nothing to do.
  monkeypatch.setattr(self_training.augment, 'main', lambda _: 1 / 0)
  again = bench(*COMMAND)
  assert again[0] == 0 and again[1].splitlines()[-8:] == out.splitlines()[-8:]


@pytest.mark.parametrize('arguments, message', [
    (['--steps', '0'], '--steps=0: wanted 1 or more'),
    (['--config', 'nothing.py'], '--config=nothing.py: wanted a Python file'),
    (['--config', 'configs/vqa.py'], '--config=configs/vqa.py: wanted vqa and captioning'),
])
def test_mistakes_are_told_in_one_line(bench, arguments, message):
  code, _, err = bench(*arguments)
  assert code == 2 and err.startswith(f'error: {message}') and err.count('\n') == 1
