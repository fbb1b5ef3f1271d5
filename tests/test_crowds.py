"""Crowded scenes: their pictures, and that each text is unambiguous and necessary."""

import collections
import colorsys
import dataclasses
import math
import random
import re

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

from xmodal import config
from xmodal.data.open import open_source
from xmodal.data.scenes import shapes
from xmodal.data.scenes.crowds import Crowds
from xmodal.errors import UserError

COLORS = ('red', 'green', 'blue', 'yellow', 'purple', 'cyan')
SHAPES = ('circle', 'square', 'triangle', 'cross')
FAMILIES = ('attributes', 'extreme', 'relation')
SIDE = 64


@pytest.fixture(scope='module')
def train():
  source = Crowds('train', size=2000, image_size=SIDE)
  return [source[i] for i in range(len(source))]


# An independent evaluator: it knows the English of the texts, and the names and
# boxes of the objects, but not how either was made.


def facts(example):
  """[(words, box)] in units of the side: ({'large', 'red', 'circle', 'thing'}, (x, y, w, h))."""
  return [({*o.name.split(), 'thing', 'large' if o.box[2] > 0.2 * SIDE else 'small'},
           tuple(value / SIDE for value in o.box)) for o in example.objects]


def select(objects, phrase):
  return [o for o in objects if set(phrase.split()) <= o[0]]


def center(thing):
  x, y, width, height = thing[1]
  return x + width / 2, y + height / 2


def parse(text):
  """(description, superlative or relation or None, description of the landmark or None)"""
  if m := re.fullmatch(r'the (.+) (left of|right of|above|below|closest to) the (.+)', text):
    return m.groups()
  m = re.fullmatch(r'the (?:(leftmost|rightmost|topmost|bottommost) )?(.+)', text)
  return m[2], m[1], None


def least(candidates, measures, margin):
  """The candidate that is least by every measure, by a margin."""
  best = min(candidates, key=measures[0])
  for measure in measures:
    others = [measure(o) for o in candidates if o is not best]
    assert all(other - measure(best) > margin for other in others), 'too close to call'
  return best


def meant(text, objects):
  """(the object that the text means, the objects that fit its description)"""
  phrase, word, landmark = parse(text)
  fitting = select(objects, phrase)
  if word is None:
    (target,) = fitting
  elif landmark is None:
    measures = {
        'leftmost': (lambda o: center(o)[0], lambda o: o[1][0]),
        'rightmost': (lambda o: -center(o)[0], lambda o: -o[1][0] - o[1][2]),
        'topmost': (lambda o: center(o)[1], lambda o: o[1][1]),
        'bottommost': (lambda o: -center(o)[1], lambda o: -o[1][1] - o[1][3])}
    target = least(fitting, measures[word], 0.059)
  else:
    (anchor,) = select(objects, landmark)
    fitting = [o for o in fitting if o is not anchor]
    if word == 'closest to':
      target = least(fitting, [lambda o: math.dist(center(o), center(anchor)),
                               lambda o: math.dist(center(o), center(anchor)) - o[1][2] / 2], 0.099)
    else:
      towards = {'right of': 0, 'below': 90, 'left of': 180, 'above': 270}[word]
      turned = []
      for o in fitting:
        dx, dy = (a - b for a, b in zip(center(o), center(anchor)))
        angle = abs((math.degrees(math.atan2(dy, dx)) - towards + 180) % 360 - 180)
        assert max(abs(dx), abs(dy)) > 0.159 and not 32.1 < angle < 57.9, 'two could be said'
        turned.append(angle)
      target = fitting[np.argmin(turned)]
      assert sum(angle < 45 for angle in turned) == 1
  return target, fitting


def test_every_text_means_its_thing_and_no_other(train):
  for e in train:
    objects = facts(e)
    text = e.expression.name
    target, _ = meant(text, objects)
    assert e.objects[objects.index(target)].box == e.expression.box, text
    assert len(text.split()) <= 12
    _, word, landmark = parse(text)
    assert e.question_type == ('attributes' if not word else 'relation' if landmark else 'extreme')


def test_superlatives_and_relations_are_needed(train):
  chances = collections.defaultdict(list)
  for e in train:
    fitting = meant(e.expression.name, facts(e))[1]
    chances[e.question_type].append(1 / len(fitting))
    chances['blind'].append(1 / len(e.objects))
  assert max(chances['extreme']) < 1
  assert np.mean(np.array(chances['relation']) < 1) > 0.85  # Not with only two objects.
  # Chance of a random choice among all objects, or among those that fit the description.
  assert np.mean(chances['blind']) == pytest.approx(0.29, abs=0.02)
  assert np.mean(chances['extreme']) == pytest.approx(0.38, abs=0.02)
  assert np.mean(chances['relation']) == pytest.approx(0.49, abs=0.03)


def overlap(first, second):
  """Intersection over union of two boxes (x, y, width, height)."""
  low = np.maximum(first[:2], second[:2])
  high = np.minimum(np.add(first[:2], first[2:]), np.add(second[:2], second[2:]))
  common = np.clip(high - low, 0, None).prod()
  return common / (np.prod(first[2:]) + np.prod(second[2:]) - common)


def test_the_text_alone_does_not_say_where(train):
  texts = CountVectorizer(ngram_range=(1, 2), token_pattern=r'\w+')
  words = texts.fit_transform([e.expression.name for e in train])
  model = Ridge(30.0).fit(words, np.array([e.expression.box for e in train]))
  source = Crowds('val', size=500, image_size=SIDE)
  val = [source[i] for i in range(len(source))]
  guesses = model.predict(texts.transform([e.expression.name for e in val]))
  hits = [overlap(guess, e.expression.box) > 0.5 for guess, e in zip(guesses, val)]
  assert np.mean(hits) < 0.1


def hints(example):
  """For every object, features of the picture alone: its rank among all and among its kind."""
  objects = facts(example)
  places = np.array([center(o) for o in objects])
  rows = []
  for i, (words, box) in enumerate(objects):
    like = [len(words & other[0]) for other in objects]
    groups = [np.ones(len(objects), bool), np.array([w >= 3 for w in like])]
    ranks = [sorted((places[group] < places[i]).sum(0)) + sorted((places[group] > places[i]).sum(0))
             for group in groups]
    distances = np.sort(np.hypot(*(places - places[i]).T))
    rows.append([len(objects), *places[i], box[2], *np.bincount(like, minlength=5), *ranks[0],
                 *ranks[1], min(ranks[0]), min(ranks[1]), distances[:2].sum(), distances[-1]])
  return np.array(rows)


def test_the_picture_alone_does_not_say_which(train):
  source = Crowds('val', size=500, image_size=SIDE)
  val = [source[i] for i in range(len(source))]
  is_meant = [[o.box == e.expression.box for o in e.objects] for e in train]
  model = HistGradientBoostingClassifier(max_iter=40).fit(
      np.concatenate([hints(e) for e in train]), np.concatenate(is_meant))
  chances = np.split(model.predict_proba(np.concatenate([hints(e) for e in val]))[:, 1],
                     np.cumsum([len(e.objects) for e in val])[:-1])
  hits = [e.objects[chance.argmax()].box == e.expression.box for chance, e in zip(chances, val)]
  assert np.mean(hits) < 0.4  # 0.29 by chance.


def test_families_and_numbers_of_things_are_equally_frequent(train):
  families = collections.Counter(e.question_type for e in train)
  assert stats.chisquare([families[f] for f in FAMILIES]).pvalue > 1e-3
  numbers = collections.Counter(len(e.objects) for e in train)
  assert set(numbers) == set(range(1, 11))
  assert stats.chisquare(list(numbers.values())).pvalue > 1e-3
  kinds = collections.Counter(parse(e.expression.name)[1] for e in train)
  assert min(kinds.values()) > 0.02 * len(train), kinds
  # The order of the objects carries no information.
  places = [[o.box for o in e.objects].index(e.expression.box) for e in train
            if len(e.objects) == 10]
  assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 1e-3


# The pictures


def coverage(scene, k, outline):
  """[S, S]: the share of every pixel that shows object k, from the effect of recolouring it."""
  other = {'red': 'green', 'green': 'red', 'blue': 'yellow', 'yellow': 'blue', 'purple': 'cyan',
           'cyan': 'purple'}
  changed = list(scene.objects)
  changed[k] = dataclasses.replace(changed[k], color=other[changed[k].color])
  # The same noise and tints in both.
  pictures = [shapes.render(dataclasses.replace(scene, objects=tuple(objects)), random.Random(0),
                            outline=outline).astype(float)
              for objects in (scene.objects, changed)]
  return abs(pictures[0] - pictures[1]).sum(-1)


@pytest.mark.parametrize('side, size', [(64, 200), (32, 50), (112, 50)])
def test_pictures_show_most_of_every_thing_in_its_box(side, size):
  source = Crowds('val', size=size, image_size=side)
  hues = {'red': 0, 'yellow': 51, 'green': 130, 'cyan': 185, 'blue': 230, 'purple': 284}
  shares = []
  for e, scene in ((source[i], source.scene(i)) for i in range(size)):
    assert e.image.shape == (side, side, 3) and e.image.dtype == np.uint8
    named = [(f'{node.color} {node.shape}', node.box) for node in scene.objects]
    assert sorted(named) == sorted((o.name, o.box) for o in e.objects)
    for k, node in enumerate(scene.objects):
      alone = dataclasses.replace(scene, objects=(node,))
      whole = coverage(alone, 0, side / 64)
      there = whole > 8
      rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
      found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
      x, y, width, height = node.box
      wanted = np.array([x, y, x + width, y + height])
      assert abs(found - wanted).max() < 1.1, (node, found)
      assert wanted.min() >= 0 and wanted.max() <= side
      shares.append(coverage(scene, k, 0).sum() / coverage(alone, 0, 0).sum())
      assert shares[-1] > 0.6, (node, shares[-1])
      seen = coverage(scene, k, side / 64)
      color = np.median(e.image[seen > 0.8 * whole.max()], axis=0) / 255
      distance = abs(360 * colorsys.rgb_to_hsv(*color)[0] - hues[node.color])
      assert min(distance, 360 - distance) < 25, node
  assert min(shares) < 0.7 and np.mean(np.array(shares) < 0.95) > 0.2


def test_most_crowds_overlap(train):
  for least_number, share in ((2, 0.7), (6, 0.95)):
    crowds = [e for e in train if len(e.objects) >= least_number]
    assert np.mean([any(overlap(a.box, b.box) > 0 for a in e.objects for b in e.objects
                        if a is not b) for e in crowds]) > share


# The source


def test_a_record_depends_on_nothing_but_its_own_index():
  source = Crowds('val', size=100, seed=3)
  late, again = source[70], Crowds('val', size=71, seed=3)[70]
  np.testing.assert_array_equal(late.image, again.image)
  fields = ('objects', 'expression', 'image_id', 'question_type')
  assert [getattr(late, f) for f in fields] == [getattr(again, f) for f in fields]
  assert late.image_id == 70 and len(source) == 100 and source[-30].expression == late.expression
  assert not late.has('question') and not late.has('captions')
  doubled = Crowds('val', size=100, image_size=128, seed=3)[70]
  assert doubled.expression.name == late.expression.name
  np.testing.assert_allclose([o.box for o in doubled.objects],
                             2 * np.array([o.box for o in late.objects]))
  assert Crowds('val', size=100, seed=4)[70].objects != late.objects
  with pytest.raises(IndexError):
    source[100]


def test_splits_and_seeds_share_no_scene():
  seen = collections.Counter()
  for split, seed in (('train', 0), ('val', 0), ('test', 0), ('train', 1)):
    source = Crowds(split, size=700, seed=seed)
    for i in range(len(source)):  # Scenes that differ by less than 0.1 pixel count as one.
      seen[frozenset((o.color, o.shape, *np.round(o.box, 1)) for o in source.scene(i).objects)] += 1
  assert max(seen.values()) == 1


def test_names_can_be_left_out(train):
  names = ('red circle', 'blue cross', 'cyan square')
  source = Crowds('train', size=800, image_size=SIDE, without=names)
  rest = [source[i] for i in range(len(source))]
  found = collections.Counter(o.name for e in rest for o in e.objects)
  assert len(found) == 21 and not found.keys() & set(names)
  assert not any(name in e.expression.name for e in rest for name in names)
  for e in rest:
    assert meant(e.expression.name, facts(e))[0][1] == tuple(v / SIDE for v in e.expression.box)
  families = collections.Counter(e.question_type for e in rest)
  assert stats.chisquare([families[f] for f in FAMILIES]).pvalue > 1e-3
  # Unless held out, the names occur as often as others.
  found = collections.Counter(o.name for e in train for o in e.objects)
  assert len(found) == 24 and min(found.values()) > 0.7 * np.mean(list(found.values()))


@pytest.mark.parametrize('arguments, word', [
    (dict(split='validation', size=1), 'validation'), (dict(split='val', size=0), 'size is 0'),
    (dict(split='val', size=1, image_size=31), 'image_size is 31'),
    (dict(split='val', size=1, without=('red circles',)), "'red circles'"),
    (dict(split='val', size=1, without=[f'{c} {s}' for c in COLORS for s in SHAPES[1:]]),
     'leaves 6 of 24')])
def test_mistakes_are_named_in_one_line(arguments, word):
  with pytest.raises(UserError) as error:
    Crowds(**arguments)
  assert word in str(error.value) and '\n' not in str(error.value)


def test_a_config_asks_for_crowds():
  c = config.base()
  assert type(open_source(c, 'train', train=True)) is shapes.Shapes
  c.data.crowded = True
  c.data.image_size = 64
  c.data.without = ('red circle',)
  trained, held_out = (open_source(c, split, train=split == 'train') for split in ('train', 'val'))
  assert (len(trained), len(held_out)) == (c.data.train_examples, c.data.eval_examples)
  whole = Crowds('val', size=1)
  np.testing.assert_array_equal(held_out[0].image, whole[0].image)
  for source, there in ((trained, False), (held_out, True)):
    assert there == any(o.name == 'red circle' for i in range(200) for o in source[i].objects)
  c.data.crowded = False
  with pytest.raises(UserError, match='config.data.without.*crowded'):
    open_source(c, 'train', train=True)
