"""Scenes for image generation, and the rule-based judge: what it detects and what it accepts."""

import collections

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
import pytest
import tiny

from xmodal.data.example import Example
from xmodal.data.open import open_source
from xmodal.data.scenes import judge as drawings
from xmodal.data.scenes.drawings import RELATIONS, CaptionContent, Drawings, parse
from xmodal.data.scenes.words import COLORS, SHAPES, SIZES, Thing
from xmodal.errors import UserError

OPPOSITE = {'above': 'below', 'below': 'above', 'left of': 'right of', 'right of': 'left of'}


@pytest.fixture(scope='module', params=[32, 64])
def scenes(request):
  source = Drawings('test', size=1000, image_size=request.param)
  return [(source[i], source.scene(i)) for i in range(len(source))]


def test_the_judge_passes_true_pictures(scenes):
  faults = [drawings.fault(e.image, parse(e.captions[0])) for e, _ in scenes]
  assert sum(map(bool, faults)) <= 10, collections.Counter(faults)


def other(words, word):
  return words[(words.index(word) + 1) % len(words)]


def wrongs(wanted):
  """Captions with another color, shape, size, number or relation."""
  first, *second = wanted.things
  for thing in (first._replace(color=other(COLORS, first.color)),
                first._replace(shape=other(SHAPES, first.shape)),
                *([first._replace(size=other(SIZES, first.size))] if first.size else [])):
    yield CaptionContent((thing, *second), wanted.relation)
  if not second:
    yield CaptionContent((first, Thing(None, 'red', 'cross')), 'above')
    return
  second, = second
  yield CaptionContent((first,))
  yield CaptionContent((first, second), OPPOSITE[wanted.relation])
  yield CaptionContent((first, second), RELATIONS[(RELATIONS.index(wanted.relation) + 2) % 4])
  if first.color != second.color and first.shape != second.shape:
    yield CaptionContent((first._replace(color=second.color), second._replace(color=first.color)),
                 wanted.relation)


def test_the_judge_lets_no_wrong_caption_pass(scenes):
  for example, _ in scenes[:300]:
    for wrong in wrongs(parse(example.captions[0])):
      assert drawings.fault(example.image, wrong), (example.captions, str(wrong))


def test_the_judge_sees_places_and_sizes_as_they_were_drawn(scenes):
  for example, scene in scenes[:200]:
    seen = drawings.look(example.image)
    for thing in scene.objects:
      of_it, = (s for s in seen if s.thing == Thing(thing.size, thing.color, thing.shape))
      np.testing.assert_allclose(of_it.center, thing.center, atol=0.5)


RED, BLUE, GREY = (215, 45, 45), (45, 75, 225), (215, 215, 215)


def drawn(*shapes, side=64):
  """A picture of (method of ImageDraw, points, colour), four times finer and then averaged."""
  image = Image.new('RGB', (4 * side, 4 * side), GREY)
  pen = ImageDraw.Draw(image)
  for method, points, colour in shapes:
    getattr(pen, method)([4 * p for p in points], fill=colour)
  return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def test_the_judge_knows_shapes_that_others_drew():
  """With Pillow's renderer, not ours."""
  circle, square = ('ellipse', (10, 6, 34, 30), RED), ('rectangle', (14, 38, 36, 60), BLUE)
  triangle = ('polygon', (22, 6, 34, 30, 10, 30), RED)
  assert not drawings.fault(drawn(circle), parse('A large red circle.'))
  assert not drawings.fault(drawn(circle, square), parse('a red circle above a blue square'))
  assert not drawings.fault(drawn(square, circle), parse('a blue square below a red circle'))
  assert not drawings.fault(drawn(triangle), parse('a red triangle'))
  for caption in ('a red square', 'a blue circle', 'a red circle left of a blue square'):
    assert drawings.fault(drawn(circle), parse(caption))


@pytest.mark.parametrize('shapes, why', [
    ((), '0 things, not 1'),
    ((('ellipse', (10, 6, 34, 30), RED), ('ellipse', (40, 40, 46, 46), BLUE)), '2 things, not 1'),
    ((('ellipse', (10, 6, 34, 30), (120, 120, 60)),), 'circle, not red circle'),
    ((('pieslice', (10, 6, 34, 30, 0, 45), RED),), None)], ids=['none', 'two', 'brown', 'slice'])
def test_what_is_no_red_circle_does_not_pass(shapes, why):
  if why is None:  # an odd shape
    picture = drawn(('polygon', (10, 6, 34, 10, 30, 30, 12, 14), RED))
    assert 'red, not' in drawings.fault(picture, parse('a red circle'))
    return
  assert why in drawings.fault(drawn(*shapes), parse('a red circle'))


def test_of_two_things_alike_either_may_be_the_first():
  above, below = ('ellipse', (10, 6, 26, 22), RED), ('ellipse', (10, 34, 36, 60), RED)
  for relation, right in (('above', True), ('below', True), ('left of', False)):
    wanted = parse(f'a red circle {relation} a red circle')
    assert (not drawings.fault(drawn(above, below), wanted)) == right


def test_half_a_thing_of_another_colour_or_a_smear_does_not_pass():
  picture = drawn(('ellipse', (10, 6, 34, 30), RED)).copy()
  assert not drawings.fault(picture, parse('a red circle'))
  blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(6)))
  assert drawings.fault(blurred, parse('a red circle'))
  half = picture.copy()
  half[18:][half[18:, :, 0] > half[18:, :, 2] + 90] = BLUE
  for caption in ('a red circle', 'a blue circle'):
    assert drawings.fault(half, parse(caption))
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  assert drawings.fault(noise, parse('a red circle'))


def test_faithfulness_is_reported_for_seen_and_unseen_names():
  wanted = [parse(text) for text in ('a red circle', 'a red circle', 'a blue square',
                                     'a red circle above a blue square')]
  shares = drawings.faithfulness(['', '0 things', '', ''], wanted, ['red circle'])
  assert shares == {
      'faithfulness': 0.75, 'one_object': 2 / 3, 'two_objects': 1.0, 'faithfulness/seen': 0.5,
      'faithfulness/unseen': 1.0, 'one_object/seen': 0.5, 'one_object/unseen': 1.0,
      'two_objects/unseen': 1.0, 'examples/faithfulness': 4, 'examples/one_object': 3,
      'examples/two_objects': 1, 'examples/faithfulness/seen': 2,
      'examples/faithfulness/unseen': 2, 'examples/one_object/seen': 2,
      'examples/one_object/unseen': 1, 'examples/two_objects/unseen': 1}


# The scenes


def test_captions_can_be_read_back_and_say_what_is_there(scenes):
  kinds = collections.Counter()
  for example, scene in scenes:
    text, = example.captions
    wanted = parse(text)
    assert str(wanted) == text
    kinds[wanted.relation] += 1
    assert len(scene.objects) == len(wanted.things)
    for thing, said in zip(scene.objects, wanted.things):
      assert Thing(thing.size, thing.color, thing.shape).matches(said)
    assert drawings.pairs(wanted) == [o.name for o in example.objects]
    assert len(set(drawings.pairs(wanted))) == len(wanted.things)
    for x, y, w, h in (o.box for o in scene.objects):
      assert min(x, y) >= 0 and max(x + w, y + h) <= scene.image_size
  assert abs(kinds[''] - 500) < 60 and all(abs(kinds[r] - 125) < 45 for r in RELATIONS)


def test_scenes_are_the_same_at_every_size_and_another_in_every_split():
  small, large = (Drawings('val', size=5, image_size=side) for side in (32, 64))
  for i in range(5):
    assert small[i].captions == large[i].captions
    np.testing.assert_allclose(np.multiply(small[i].objects[0].box, 2), large[i].objects[0].box)
    np.testing.assert_array_equal(small[i].image, small[i].image)
  assert [e.captions for e in small] != [e.captions for e in Drawings('test', size=5)]


def test_names_left_out_are_in_no_training_scene_and_in_evaluation():
  c = tiny.changed(data__drawn=True, data__without=('red circle', 'blue square'),
                   data__train_examples=400, data__eval_examples=400)
  names = {use: {o.name for e in open_source(c, split, train=use == 'train') for o in e.objects}
           for use, split in (('train', 'train'), ('eval', 'val'))}
  assert names['eval'] - names['train'] == {'red circle', 'blue square'}
  assert isinstance(open_source(c, 'val', train=False)[0], Example)


def test_two_kinds_of_scenes_or_an_unknown_name_are_mistakes():
  with pytest.raises(UserError, match='config.data.crowded=True and config.data.drawn=True'):
    open_source(tiny.changed(data__drawn=True, data__crowded=True), 'train', train=True)
  with pytest.raises(UserError, match="'red dog'"):
    open_source(tiny.changed(data__drawn=True, data__without=('red dog',)), 'train', train=True)


@pytest.mark.parametrize('text', ['', 'red circle', 'a red circle above', 'a pink circle',
                                  'a red circle above a blue square above a red cross',
                                  'a circle', 'three red circles'])
def test_other_texts_are_no_captions_of_such_scenes(text):
  assert parse(text) is None
