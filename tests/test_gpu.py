"""Tests that need an NVIDIA GPU: JAX_PLATFORMS=cuda python -m pytest tests/test_gpu.py."""

import json

import cv2
import jax
import numpy as np
import pytest
import tiny

from xmodal.sharding import mesh as meshes
from xmodal.train.plan import Plan
from xmodal.train.programs import compile_step
from xmodal.train.steps import state as states

pytestmark = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='wants an NVIDIA GPU')
TASKS = ('vqa', 'objects', 'detection', 'captioning', 'retrieval', 'regression', 'generation')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder of wide and high pictures, with labels for every task."""
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  lines = []
  for number in range(32):
    height, width = ((40, 24), (24, 40))[number % 2]
    picture = np.full((height, width, 3), rng.integers(60, 200), np.uint8)
    x, y, size = (int(v) for v in rng.integers(3, 12, 3))
    picture[y:y + size, x:x + size] = (30, 30, 220)
    cv2.imwrite(str(folder / f'{number}.png'), picture)
    name = ('square', 'block')[size > 7]
    lines.append({'image': f'{number}.png', 'question': 'what is red?', 'answers': [name],
                  'caption': [f'a {name} on the {"left" if x < 8 else "right"}'], 'number': size,
                  'objects': [{'name': name, 'box': [x, y, size, size]}]})
  for split in ('train', 'val'):
    (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return folder


def two_steps(pictures, folder, task, dtype, attention):
  """Losses and gradient norms of a task's first two steps, with padding in pictures and texts."""
  c = tiny.changed(data__source='jsonl', data__root=str(pictures), data__keep_aspect=True,
                   mixer__tasks=(task,), mixer__weights=(1.0,), model__dtype=dtype,
                   model__attention=attention)
  run = Plan(c, str(folder))
  step, state, found = compile_step(run), states.create(run.init, run.abstract), []
  for number in range(2):
    records = np.arange(8 * number, 8 * (number + 1))
    batch = meshes.put_batch(run.maker('train')(records, records), run.mesh, 8)
    state, metrics = step(state, batch)
    found += [float(metrics['loss']), float(metrics['gradient_norm'])]
  return found


@pytest.mark.parametrize('task', TASKS)
def test_steps_in_16_bits_with_either_attention_are_near_those_in_32(pictures, tmp_path, task):
  with jax.default_matmul_precision('highest'):
    exact = two_steps(pictures, tmp_path, task, 'float32', 'xla')
    for attention in ('xla', 'cudnn'):
      rounded = two_steps(pictures, tmp_path, task, 'bfloat16', attention)
      assert rounded == pytest.approx(exact, rel=0.05)
