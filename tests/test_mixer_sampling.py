"""Task and example sampling: exact, and the same after any stop."""

import numpy as np
import pytest
import tiny

from xmodal import config as configs
from xmodal.data import pipeline
from xmodal.data.example import Example
from xmodal.errors import UserError
from xmodal.mixer.feed import BatchStream, open_feeds, parts, task_config
from xmodal.mixer.sampling.sampling import Sampling, StepKind, make_sampling
from xmodal.mixer.sampling.shares import apportion

SIZES = {'vqa': 700, 'objects': 200, 'detection': 100}


def sampling(name, sizes=SIZES, **values):
  c = tiny.changed(mixer__sampling=name, mixer__tasks=tuple(sizes), **values)
  return make_sampling(c, sizes)


def tasks_at(sampled, step):
  return sampled.kinds[sampled.kind(step)].tasks


def count(sampled, task, steps):
  return sum(task in tasks_at(sampled, step) for step in steps)


def test_joint_trains_every_task_in_every_step():
  sampled = sampling('joint')
  assert {tasks_at(sampled, step) for step in range(5)} == {tuple(SIZES)}
  assert sampled.count_steps(('objects',), 10 ** 15) == 10 ** 15


def test_round_robin_takes_turns():
  sampled = sampling('round_robin')
  assert [tasks_at(sampled, step) for step in range(4)] == [
      ('vqa',), ('objects',), ('detection',), ('vqa',)]


@pytest.mark.parametrize('name, temperature, expected', [
    ('proportional', 2.0, (70, 20, 10)), ('temperature', 1.0, (70, 20, 10)),
    ('temperature', 2.0, (52, 28, 20)),  # square roots in ratio 52.3 : 27.9 : 19.8
    ('temperature', 1e9, (34, 33, 33))])
def test_every_cycle_has_the_exact_share_of_each_task(name, temperature, expected):
  sampled = sampling(name, mixer__temperature=temperature)
  for cycle in (0, 1, 12345):
    steps = range(100 * cycle, 100 * cycle + 100)
    assert tuple(count(sampled, task, steps) for task in SIZES) == expected


def test_the_order_is_of_the_seed_and_the_cycle():
  def order(seed, cycle):
    sampled = sampling('proportional', seed=seed)
    return [sampled.kind(step) for step in range(100 * cycle, 100 * cycle + 100)]

  assert order(0, 3) == order(0, 3)
  assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


@pytest.mark.parametrize('name', ['joint', 'proportional', 'temperature', 'round_robin'])
def test_steps_are_counted_without_going_through_them(name):
  sampled = sampling(name)
  for tasks in (('vqa',), ('objects', 'detection'), tuple(SIZES)):
    taken = np.cumsum([0, *(not set(tasks).isdisjoint(tasks_at(sampled, s)) for s in range(250))])
    assert [sampled.count_steps(tasks, step) for step in range(251)] == taken.tolist()
    far = 10 ** 15
    assert sampled.count_steps(tasks, far + 1) - sampled.count_steps(tasks, far) == (
        not set(tasks).isdisjoint(tasks_at(sampled, far)))


@pytest.mark.parametrize('amounts, total, expected', [
    ((1, 1, 1), 100, [34, 33, 33]), ((10 ** 9, 1, 1), 100, [98, 1, 1]),
    ((5.5, 3.1, 1.4), 10, [6, 3, 1]), ((1, 10 ** 6, 2 * 10 ** 6), 4, [1, 1, 2]), ((3,), 7, [7])])
def test_whole_steps_are_given_out_by_largest_remainders(amounts, total, expected):
  assert apportion(amounts, total) == expected


def test_turns_of_tasks_and_of_parameters():
  turns = (('vqa', 2), ('objects|detection', 1), ('vqa', 1))
  sampled = sampling('alternating', mixer__turns=turns, mixer__turns_of='tasks')
  assert sampled.kinds == (StepKind(('vqa',)), StepKind(('objects', 'detection')))
  assert [sampled.kind(step) for step in range(6)] == [0, 0, 1, 0, 0, 0]
  assert sampled.count_steps(('detection',), 11) == 3
  turns = (('vision_tower', 3), ('text_tower|heads', 1))
  sampled = sampling('alternating', mixer__turns=turns)
  assert [sampled.kinds[sampled.kind(step)].updated for step in (0, 2, 3, 4)] == [
      'vision_tower', 'vision_tower', 'text_tower|heads', 'vision_tower']
  assert sampled.count_steps(('vqa',), 9) == 9


@pytest.mark.parametrize('values, words', [
    ({'mixer__sampling': 'random'}, "no sampling 'random'; wanted one of alternating, joint"),
    ({'mixer__turns': (('vqa', 1),)},
     "means nothing to config.mixer.sampling='joint'; .* take 'alternating'"),
    ({'mixer__sampling': 'alternating'}, 'wanted pairs'),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('vision', 0),)}, 'wanted pairs'),
    ({'mixer__sampling': 'alternating', 'mixer__turns': ((5, 'vision'),)}, 'wanted pairs'),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('vis(', 5),)}, 'no regular expression'),
    ({'mixer__turns_of': 'heads'}, "turns_of='heads'"),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('a', 5),), 'mixer__turns_of': 'heads'},
     "turns_of='heads'"),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('vqa', 5),), 'mixer__turns_of': 'tasks'},
     'objects has no turn'),
    ({'mixer__sampling': 'alternating', 'mixer__turns': (('vqq', 5),), 'mixer__turns_of': 'tasks'},
     "'vqq' matches none of")])
def test_turns_that_cannot_be_are_one_line(values, words):
  with pytest.raises(UserError, match=words) as error:
    c = tiny.changed(**values)
    configs.check(c)
    make_sampling(c, {'vqa': 5, 'objects': 5})
  assert '\n' not in str(error.value)


# The examples of a task


class Number:
  """A task whose feature is the record's number."""

  def encode(self, example, placement):
    return {'number': np.int32(-1 if example.number is None else example.number)}


def stream(**sizes):
  """A stream with one feed per name, of the given sizes; 'a+b' is a feed of two tasks."""
  makers = {}
  for name, size in sizes.items():
    source = [Example(np.zeros((8, 8, 3), np.uint8), number=i) for i in range(size)]
    makers[name] = pipeline.BatchMaker(source, {task: Number() for task in name.split('_')}, (8, 8),
                                       bad=None, seed=7)
  return BatchStream(makers)


def test_each_source_gives_each_example_once_an_epoch_of_its_own():
  both = stream(a_b=12, c=20)
  sampled = Sampling((StepKind(('a',)), StepKind(('b',)), StepKind(('c',))),
                     ((0, 2), (1, 1), (2, 2)), seed=3)
  seen = {'a_b': [], 'c': []}
  for step in range(60):
    batch = both.at(tasks_at(sampled, step), sampled, step, batch_size=4)
    (feed, part), = batch.items()
    task, = set(part) - {'image', 'valid'}
    assert task in tasks_at(sampled, step)
    seen[feed] += part[task]['number'].tolist()
  for feed, size in (('a_b', 12), ('c', 20)):  # 36 steps of 4 make 12 epochs, 24 make 4.8
    assert len(seen[feed]) >= 4 * size
    for start in range(0, len(seen[feed]) - size + 1, size):
      assert sorted(seen[feed][start:start + size]) == list(range(size))


def test_a_joint_batch_has_a_part_of_each_source_and_one_source_makes_a_flat_one():
  batch = stream(a_b=12, c=20).filler(('a', 'b', 'c'))
  assert batch.keys() == {'a_b', 'c'} and batch['a_b'].keys() == {'image', 'valid', 'a', 'b'}
  assert len(parts(batch)) == 2
  flat = stream(a_b=12).filler(('b',))
  assert flat.keys() == {'image', 'valid', 'b'} and parts(flat) == (flat,)


def test_a_late_start_gives_bit_identical_batches_of_changing_tasks():
  both = stream(a=12, b=5)
  sampled = Sampling((StepKind(('a',)), StepKind(('b',))), ((0, 3), (1, 2)), seed=1)
  straight = list(both.batches(sampled, 4, 0, 9))
  assert {tuple(batch) for batch in straight} == {('a',), ('b',)}
  resumed = list(both.batches(sampled, 4, 6, 9))
  for a, b in zip(straight[6:], resumed, strict=True):
    (name, part), = a.items()
    np.testing.assert_array_equal(part[name]['number'], b[name][name]['number'])


# The source of each task


def own_data(**values):
  c = tiny.changed(mixer__tasks=('vqa', 'objects', 'detection'))
  c.update_from_flattened_dict({f'mixer.data.{key.replace("__", ".")}': value
                                for key, value in values.items()})
  return c


def test_tasks_with_the_same_data_share_a_source():
  c = own_data(detection__crowded=True, detection__train_examples=9,
               detection__augment__mirror=True, objects__crowded=False)
  plain, crowded = open_feeds(c, c.mixer.tasks, ('train', 'eval'))
  assert plain.tasks == ('vqa', 'objects') and crowded.tasks == ('detection',)
  assert len(plain.sources['train']) == 64 and len(crowded.sources['train']) == 9
  assert crowded.sources['eval'][0].expression and not plain.sources['eval'][0].expression
  assert crowded.config.data.augment.mirror and not plain.config.data.augment.mirror
  feed, = open_feeds(own_data(), c.mixer.tasks, ('eval',))
  assert feed.tasks == c.mixer.tasks and feed.config.data == c.data


@pytest.mark.parametrize('changes, words', [
    ({'detection': {'rot': 'x'}}, r'mixer\.data\.detection\.rot: wanted one of .*augment, blank'),
    ({'detection': {'image_size': 64}}, r'mixer\.data\.detection\.image_size: wanted one of'),
    ({'detection': {'augment': {'twist': 1.0}}}, r'detection\.augment\.twist: wanted one of'),
    ({'detection': {'crowded': 'very'}}, r"detection\.crowded='very': wanted bool"),
    ({'detectoin': {'root': 'x'}}, r"mixer\.data\.detectoin: no such task"),
    ({'detection': {'source': 'coco', 'root': '/nowhere'}}, 'data of detection: .*/nowhere'),
    ({'detection': {'augment': {'crop': 3.0}}},
     r'data of detection: config\.mixer\.data\.detection\.augment\.crop=3')])
def test_data_that_cannot_be_is_one_line(changes, words):
  c = own_data()
  c.mixer.data = changes  # as a config file may set it
  with pytest.raises(UserError, match=words) as error:
    open_feeds(c, c.mixer.tasks, ('train', 'eval'))
  assert '\n' not in str(error.value)


def test_the_config_of_a_task_has_its_own_data_alone():
  c = own_data(detection__keep_aspect=True)
  assert task_config(c, 'detection').data.keep_aspect and not task_config(c, 'vqa').data.keep_aspect
  assert not c.data.keep_aspect
