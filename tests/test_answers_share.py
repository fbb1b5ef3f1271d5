"""data.answers_share: which records keep their answers, and what the others keep."""

import dataclasses

import numpy as np
import pytest
import tiny

from xmodal.data.answers_share import PartlyAnswered
from xmodal.data.example import Example
from xmodal.data.faults import Examples
from xmodal.data.open import open_source
from xmodal.data.pictures.placement import Placement
from xmodal.data.scenes.shapes import Shapes
from xmodal.data.sources.source import SOURCES
from xmodal.data.tokenizer import train_tokenizer
from xmodal.errors import UserError
from xmodal.mixer.feed import open_feeds
from xmodal.registry import Part
from xmodal.tasks.vqa import VQA


def config(**values):
  return tiny.changed(data__train_examples=200, **values)


def answered(source):
  return [i for i in range(len(source)) if source[i].answers]


def test_a_share_of_the_records_keeps_its_answers_and_all_else_stays():
  whole = open_source(config(), 'train', train=True)
  part = open_source(config(data__answers_share=0.3), 'train', train=True)
  kept = answered(part)
  assert len(part) == 200 and len(kept) == 60
  for i in range(200):
    # The reason contains the answer ('There are two circles.').
    assert whole[i].answers and whole[i].reason
    expected = whole[i] if i in kept else dataclasses.replace(whole[i], answers=(), reason='')
    for field in dataclasses.fields(Example):
      np.testing.assert_array_equal(getattr(part[i], field.name), getattr(expected, field.name))
  # Evenly spread: each tenth of the records has about its share.
  assert 1 <= np.histogram(kept, 10, (0, 200))[0].min() and max(
      np.histogram(kept, 10, (0, 200))[0]) <= 13


def test_seeds_choose_other_records_and_the_order_of_reading_changes_nothing():
  source = Shapes('train', size=100, image_size=32)
  kept = [answered(PartlyAnswered(source, 0.2, seed)) for seed in (0, 0, 1)]
  assert kept[0] == kept[1] != kept[2]
  part = PartlyAnswered(source, 0.2, 0)
  assert [i for i in reversed(range(100)) if part[i].answers] == kept[0][::-1]


def test_only_training_loses_answers():
  validation = open_source(config(data__answers_share=0.1), 'val', train=False)
  assert len(answered(validation)) == len(validation)


def test_a_question_without_answers_counts_for_nothing():
  part = open_source(config(data__answers_share=0.5), 'train', train=True)
  examples = [part[i] for i in range(8)]
  task = VQA(train_tokenizer([e.question for e in examples], 100), ('yes', 'no'),
             question_length=12, answer_length=4, generation_weight=0.1)
  for example in examples:
    weights = task.weights(task.encode(example, Placement(32, 32)))
    assert weights['gen'] == bool(example.answers)
    if not example.answers:
      assert weights['cls'] == 0


def test_tasks_that_learn_from_answers_alone_read_no_other_records():
  lengths = {}
  for tasks, changes in {
      ('vqa',): {'data__answers_share': 0.1},
      ('vqa', 'objects'): {'data__answers_share': 0.1},
      ('objects', 'vqa'): {'mixer__data__vqa__answers_share': 0.1}}.items():
    c = config(mixer__tasks=tasks, **changes)
    lengths[tasks] = {feed.name: (len(feed.sources['train']), len(answered(feed.sources['train'])))
                      for feed in open_feeds(c, tasks, ('train', 'eval'))}
  assert lengths == {
      ('vqa',): {'vqa': (20, 20)}, ('vqa', 'objects'): {'vqa and objects': (200, 20)},
      ('objects', 'vqa'): {'objects': (200, 200), 'vqa': (20, 20)}}


def test_files_stay_lists_with_their_faults(monkeypatch):
  read = Examples([Example(f'{i}.jpg', question='?', answers=('a',)) for i in range(10)], ('bad',))
  monkeypatch.setitem(SOURCES._parts, 'jsonl', Part(lambda root, split: read, {}, {}))
  part = open_source(config(data__source='jsonl', data__root='x', data__answers_share=0.3), 'train',
                     train=True)
  assert isinstance(part, list) and part.faults == ('bad',)
  assert [e.image for e in part] == [e.image for e in read] and len(answered(part)) == 3


def test_no_answers_at_all_is_one_line():
  with pytest.raises(UserError, match=r'config.data.answers_share=0.0: wanted above 0, at most 1'):
    open_feeds(config(data__answers_share=0.0), ('vqa',), ('train',))
