"""A second run on a pack learns nothing anew, and what it reads is what the first learned."""

import json

from PIL import Image
import pytest
import tiny

from xmodal.data.pack import pack
from xmodal.data.scenes.shapes import Shapes
from xmodal.train import build
from xmodal.train.plan import Plan


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  for split, count in (('train', 30), ('val', 8)):
    source, lines = Shapes(split, size=count, image_size=32), []
    for i in range(count):
      Image.fromarray(source[i].image).save(folder / f'{split}{i}.png')
      lines.append({'image': f'{split}{i}.png', 'question': source[i].question,
                    'answers': source[i].answers})
    (folder / f'{split}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert pack.main([str(folder), '--output', str(folder / 'pack')]) == 0
  return folder


def plan(packed, source='pack', **values):
  root = packed / 'pack' if source == 'pack' else packed
  return Plan(tiny.changed(data__source=source, data__root=str(root), mixer__tasks=('vqa',),
                           mixer__weights=(1.0,), **values), 'unused')


def test_it_is_learned_once_for_a_pack_and_config(packed, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  learned, learn = [], build.learn
  monkeypatch.setattr(build, 'learn', lambda *a: learned.append(1) or learn(*a))
  first, again, plain = plan(packed), plan(packed), plan(packed, 'jsonl')
  assert len(learned) == 2  # the files have no name that never changes
  for other in (again, plain):
    assert other.tasks['vqa'].answers == first.tasks['vqa'].answers
    texts = ['is there a red circle?']
    assert other.tokenizer.encode(texts, 12).tolist() == first.tokenizer.encode(texts, 12).tolist()
  assert again.notes == first.notes and any('answer list' in note for note in first.notes)
  plan(packed, vqa__max_answers=3)
  assert len(learned) == 3
  for path in tmp_path.rglob('*.json'):
    path.write_text('{')  # cut
  assert plan(packed).notes == first.notes and len(learned) == 4


def test_without_a_cache_it_is_learned_each_time(packed, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  monkeypatch.setenv('HOME', str(tmp_path / 'file'))
  (tmp_path / 'file').touch()
  assert plan(packed).tasks['vqa'].answers
