"""Batches: every example once, the same after any stop, with correct answers after augmentation."""

import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from xmodal.data import pipeline
from xmodal.data.english import is_english
from xmodal.data.example import Example, Object
from xmodal.data.pictures.augmentation import Augmentation, language_notes
from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError

CHANGES = Augmentation(mirror=True, zoom=0.5, light=0.2)


class Boxes:
  """A task whose feature is each example's first box, in the model's input."""

  def encode(self, example, placement):
    boxes = [o.box for o in example.objects or ()] or [(0, 0, 0, 0)]
    return {'box': placement.boxes(np.array(boxes))[0]}


class Number:
  """A task whose feature is the record's number."""

  def encode(self, example, placement):
    return {'number': np.float32(example.number)}


def numbered(count):
  return [Example(np.full((8, 8, 3), i, np.uint8), number=float(i)) for i in range(count)]


def maker(source, task, augmentation=None, size=(32, 32), share=0.0, **options):
  bad = pipeline.BadPictures(len(source), share)
  return pipeline.BatchMaker(source, {'task': task}, size, bad, augmentation, **options)


def assert_equal(a, b):
  np.testing.assert_array_equal(a['image'], b['image'])
  np.testing.assert_array_equal(a['valid'], b['valid'])
  assert a['task'].keys() == b['task'].keys()
  for key in a['task']:
    np.testing.assert_array_equal(a['task'][key], b['task'][key])


# Evaluation counts every example once


@pytest.mark.parametrize('count, hosts', [(21, 1), (24, 1), (3, 1), (21, 2), (5, 4)])
def test_evaluation_holds_every_record_once(count, hosts):
  make = maker(numbered(count), Number())
  parts = [list(pipeline.eval_batches(make, 8, rows)) for rows in np.split(np.arange(8), hosts)]
  assert len({len(part) for part in parts}) == 1  # or hosts would deadlock
  seen = [number for batches in zip(*parts) for batch in batches
          for number in batch['task']['number'][batch['valid']]]
  assert seen == list(range(count))
  assert all(batch['valid'].shape == (8 // hosts,) for part in parts for batch in part)


# Training resumes as if it had not stopped


def test_a_late_start_gives_bit_identical_batches():
  make = maker(Shapes('train', size=20, image_size=32), Boxes(), CHANGES, seed=5)
  straight = list(pipeline.train_batches(make, 8, 0, 6))  # across two epoch ends
  resumed = list(pipeline.train_batches(make, 8, 4, 6))
  assert len(straight) == 6
  for a, b in zip(straight[4:], resumed, strict=True):
    assert_equal(a, b)


def test_hosts_read_the_parts_of_one_batch():
  make = maker(Shapes('train', size=20, image_size=32), Boxes(), CHANGES)
  whole, = pipeline.train_batches(make, 8, 3, 4)
  for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 6, 7]):
    part, = pipeline.train_batches(make, 8, 3, 4, np.array(rows))
    np.testing.assert_array_equal(part['image'], whole['image'][rows])


def test_a_change_depends_on_seed_and_position_alone():
  source = Shapes('train', size=4, image_size=32)
  make = maker(source, Boxes(), CHANGES, seed=5)
  batch = make(np.array([0, 1, 2, 0]), np.array([40, 41, 42, 43]))
  alone = make(np.array([2]), np.array([42]))
  np.testing.assert_array_equal(batch['image'][2], alone['image'][0])
  assert (batch['image'][0] != batch['image'][3]).any()  # one record, augmented anew at each visit
  other_seed = maker(source, Boxes(), CHANGES, seed=6)(np.array([2]), np.array([42]))
  assert (other_seed['image'] != alone['image']).any()


def test_evaluation_pictures_are_not_changed():
  source = Shapes('val', size=2, image_size=32)
  batch = maker(source, Boxes())(np.array([0, 1]), np.array([0, 1]))
  for i in range(2):
    np.testing.assert_array_equal(batch['image'][i], source[i].image)


# Augmentation keeps answers correct


def painted(box, width, height):
  """A blue picture with a red box (x, y, w, h) in it."""
  x, y, w, h = box
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[..., 2] = 200
  pixels[y:y + h, x:x + w] = (250, 0, 0)
  return pixels


@pytest.mark.parametrize('size', [(64, 64), (48, 80)])
def test_boxes_follow_the_picture(size):
  """The red pixels of the model's input lie where the transformed box says."""
  box, width, height = (10, 30, 30, 20), 100, 75
  source = [Example(painted(box, width, height), objects=(Object('red', box),))]
  make = maker(source, Boxes(), Augmentation(mirror=True, zoom=0.5), size)
  batch = make(np.zeros(40, int), np.arange(40))
  sides = set()
  for pixels, found in zip(batch['image'], batch['task']['box']):
    rows, columns = np.nonzero(pixels[..., 0].astype(int) > 200)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(seen - found * np.tile(size[::-1], 2)).max() <= 1.5
    # The box is in the left part of the picture, so most blue is to its right.
    sides.add(bool((pixels[..., 2] > 150).nonzero()[1].mean() > columns.mean()))
  assert sides == {True, False}  # flipped and not


def asymmetric():
  pixels = np.zeros((32, 32, 3), np.uint8)
  pixels[:, :16] = 255
  return pixels


def share_mirrored(**texts):
  make = maker([Example(asymmetric(), **texts)], Boxes(), Augmentation(mirror=True))
  return make(np.zeros(200, int), np.arange(200))['image'][:, 16, 31, 0].mean() / 255


def test_half_of_the_pictures_are_mirrored():
  assert 0.4 < share_mirrored(question='what color is the cat?', answers=('red',)) < 0.6


@pytest.mark.parametrize('texts', [
    dict(question='Is the cat LEFT of the dog?', answers=('yes',)),
    dict(question='What color is the leftmost car?', answers=('red',)),
    dict(question='Which is the rightmost?', answers=('the car',)),
    dict(question='Is it left-hand traffic?', answers=('no',)),
    dict(question='Is the effusion right-sided?', answers=('no',)),
    dict(question='where is the cat?', answers=('on the right',)),
    dict(captions=('a dog', 'a cat to the left, asleep')),
    dict(question='what time is it?', answers=('10:10',)),
    dict(objects=(Object('left lung', (0, 0, 16, 32)),)),
    dict(question='is it big?', answers=('no',), reason='The one on the left is bigger.'),
    dict(question='what does the sign say?', answers=('stop',)),
    dict(question='which way?', answers=('links',))])
def test_no_mirror_where_a_text_mentions_sides_or_letters(texts):
  assert share_mirrored(**texts) == 0


FOREIGN = [
    dict(question='Ist die Katze links vom Hund?', answers=('ja',)),
    dict(question='Welche Farbe hat das Auto rechts?', answers=('rot',)),
    dict(question='\u732b\u5728\u72d7\u7684\u5de6\u8fb9\u5417\uff1f', answers=('\u662f',)),
    dict(captions=('a dog and a cat', 'ein Hund und links von ihm noch eine Katze')),
    dict(captions=('\u041a\u043e\u0442 \u0441\u043b\u0435\u0432\u0430',)),
    dict(captions=('le chat est \u00e0 gauche',)), dict(captions=('el gato a la izquierda',)),
    dict(captions=('paka yuko upande wa kushoto',)),
    dict(captions=('the \u5de6\u8fb9 cat is the red one',)),
    dict(objects=(Object('linker Schuh', (0, 0, 16, 32)),)),
    dict(objects=(Object('\u5de6\u8f6c', (0, 0, 16, 32)), Object('dog', (0, 0, 9, 9))))]


@pytest.mark.parametrize('texts', FOREIGN)
def test_no_mirror_where_the_language_is_not_known(texts):
  assert share_mirrored(**texts) == 0
  note, = language_notes(Augmentation(mirror=True), [Example('a.png', **texts)])
  assert 'does not change' in note and ('1 of 1 examples' in note or '1 names of objects' in note)
  assert language_notes(Augmentation(crop=0.5), [Example('a.png', **texts)]) == []


@pytest.mark.parametrize('texts', [
    dict(captions=('a man riding a wave on top of a surfboard',)), dict(captions=('red circle',)),
    dict(question='is it a caf\u00e9?', answers=('yes',)), dict(question='1 + 2?'),
    dict(objects=tuple(Object(name, (0, 0, 9, 9)) for name in ('RBC', 'fire hydrant')))])
def test_english_is_mirrored_as_ever(texts):
  assert 0.4 < share_mirrored(**texts) < 0.6
  assert language_notes(Augmentation(mirror=True), [Example('a.png', **texts)]) == []


def test_questions_of_real_data_read_as_english():
  folder = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'vqa_rad'
  if not folder.exists():
    pytest.skip('the real data is not beside the project')
  path, = folder.glob('*.json')
  questions = {str(r['question']) for r in json.loads(path.read_text(encoding='utf-8'))}
  assert len(questions) > 1900 and all(map(is_english, questions))


def inputs(changes, question):
  """The set of inputs, as bytes, of 20 visits to an example."""
  make = maker([Example(asymmetric() // 2 + 60, question=question)], Boxes(), changes)
  return {image.tobytes() for image in make(np.zeros(20, int), np.arange(20))['image']}


@pytest.mark.parametrize('question', [
    'is there a cat at the top?', 'is the largest thing red?', 'what is the topmost shape?',
    'which is the uppermost?', 'which is the bottommost?', 'which is the lowest?',
    'which is the highest?', 'what color is the leftmost car?'])
def test_no_zoom_where_a_text_mentions_place_or_size(question):
  assert len(inputs(Augmentation(zoom=0.5), question)) == 1


@pytest.mark.parametrize('question', [
    'Is it dark outside?', 'which is the brightest?', 'is the light on?', 'is it a sunny day?',
    'is it night?', 'Is the room dimly lit?', 'does it cast a shadow?', 'which shade of red?',
    'Was IV contrast given?', 'Is there a hyperdense lesion?', 'are the lesions hypointense?',
    'what is the signal intensity?', 'is there an opacity?', 'is the lung hyperlucent?'])
def test_no_change_of_light_where_a_text_mentions_it(question):
  assert len(inputs(Augmentation(light=0.3), question)) == 1


@pytest.mark.parametrize('changes', [Augmentation(zoom=0.5), Augmentation(light=0.3)], ids=str)
def test_other_questions_let_a_picture_change(changes):
  assert len(inputs(changes, 'is there slightly more than one cat today?')) > 10


# Pictures that cannot be read


def some_unreadable(folder, good, bad):
  Image.fromarray(asymmetric()).save(folder / 'good.png')
  (folder / 'bad.png').write_bytes((folder / 'good.png').read_bytes()[:60])
  examples = ([Example(str(folder / 'good.png'), number=float(i)) for i in range(good)]
              + [Example(str(folder / 'bad.png'), number=-1.0) for _ in range(bad)])
  return examples


def test_an_unreadable_picture_counts_nowhere_and_is_listed(tmp_path):
  make = maker(some_unreadable(tmp_path, good=9, bad=1), Number(), share=0.1)
  for _ in range(3):  # read again in later epochs, it counts once
    batch = make(np.array([0, 9, 1]), np.arange(3))
  np.testing.assert_array_equal(batch['valid'], [True, False, True])
  assert not batch['image'][1].any()
  assert list(make.bad.reasons) == [9] and 'bad.png' in make.bad.reasons[9]


def test_too_many_unreadable_pictures_stop_the_run_in_one_line(tmp_path):
  make = maker(some_unreadable(tmp_path, good=18, bad=2), Number(), share=0.05)
  with pytest.raises(UserError, match=r'2 of 20 pictures cannot be read.*5\.0%.*bad\.png') as error:
    list(pipeline.train_batches(make, 4, 0, 5))
  assert '\n' not in str(error.value)


def test_threads_end_with_their_batches():
  make = maker(Shapes('train', size=20, image_size=32), Boxes(), CHANGES)
  next(batches := pipeline.train_batches(make, 8, 0, 10**9))
  batches.close()  # ends its threads, which would keep the test alive


def test_a_defect_in_a_source_is_raised_as_itself():

  class Broken(list):

    def __getitem__(self, index):
      if index == 3:
        raise ZeroDivisionError('in the source')
      return super().__getitem__(index)

  with pytest.raises(ZeroDivisionError, match='in the source'):
    list(pipeline.eval_batches(maker(Broken(numbered(8)), Number()), 1))


# Baselines


def test_blank_hides_one_input_and_leaves_the_other():
  class Length:

    def encode(self, example, placement):
      return {'length': np.int32(len(example.question))}

  source = [dataclasses.replace(Shapes('train', size=1, image_size=32)[0], question='what?')]
  shown = {blank: maker(source, Length(), blank=blank)(np.array([0]), np.array([0]))
           for blank in ('', 'image', 'question')}
  assert not shown['image']['image'].any() and shown['image']['valid'].all()
  assert shown['image']['task']['length'] == 5 and shown['question']['task']['length'] == 0
  np.testing.assert_array_equal(shown['question']['image'], shown['']['image'])
