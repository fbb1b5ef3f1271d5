"""The embedded data set: its pictures, its answers and whether it is a fair test."""

import collections
import colorsys
import re

import numpy as np
from PIL import Image, ImageDraw
import pytest
from scipy import ndimage, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from xmodal.data.scenes.shapes import Shapes
from xmodal.errors import UserError

COLORS = ('red', 'green', 'blue', 'yellow', 'purple', 'cyan')
SHAPES = ('circle', 'square', 'triangle', 'cross')
ANSWERS = {
    'existence': ('yes', 'no'), 'count': tuple('01234'), 'color': COLORS, 'shape': SHAPES,
    'position': ('top left', 'top right', 'bottom left', 'bottom right'),
    'relation': ('left', 'right', 'above', 'below'), 'comparison': COLORS + SHAPES}
SIDE = 48


@pytest.fixture(scope='module')
def train():
  source = Shapes('train', size=3500, image_size=SIDE)
  return [source[i] for i in range(len(source))]


# An independent evaluator: it knows the English of the questions, and the
# names and boxes of the objects, but not how either was made.


def facts(example):
  """[(words, box)], the words being e.g. {'large', 'red', 'circle', 'object'}."""
  return [({*o.name.split(), 'object', 'large' if o.box[2] > 0.18 * SIDE else 'small'}, o.box)
          for o in example.objects]


def select(objects, phrase):
  singular = phrase.replace('crosses', 'cross').replace('objects', 'object')
  words = set(re.sub(r'(circle|square|triangle)s', r'\1', singular).split())
  return [o for o in objects if words <= o[0]]


def only(objects, phrase):
  found = select(objects, phrase)
  assert len(found) == 1, f'{phrase} names {len(found)} objects'
  return found[0]


def center(thing):
  x, y, width, height = thing[1]
  return x + width / 2, y + height / 2


def offset(direction, first, second):
  """Pixels by which the first lies further in the direction than the second does."""
  (x, y), (u, v) = center(first), center(second)
  return {'left': u - x, 'right': x - u, 'above': v - y, 'below': y - v}[direction]


def word_of(thing, words):
  (found,) = thing[0] & set(words)
  return found


def answer(question, objects):
  """The answer by the rules of English, 'yes' or 'no' as True or False."""
  text = question.removesuffix('?')
  if m := (re.fullmatch(r'Which (?:color|shape) is there more of, (\w+) or (\w+)', text)
           or re.fullmatch(r'Which (?:color|shape) is more frequent, (\w+) or (\w+)', text)):
    difference = len(select(objects, m[1])) - len(select(objects, m[2]))
    assert difference, 'as many of both'
    return m[1] if difference > 0 else m[2]
  if m := re.fullmatch(r'Which (?:one )?is larger, the (.+) or the (.+)', text):
    first, second = (only(objects, phrase)[1][2] for phrase in (m[1], m[2]))
    assert max(first, second) > 1.4 * min(first, second), 'too close to call'
    return (m[1] if first > second else m[2]).removesuffix(' object')
  if m := (re.fullmatch(r'Where is the (.+) relative to the (.+)', text)
           or re.fullmatch(r'In which direction is the (.+) from the (.+)', text)
           or re.fullmatch(r'Where does the (.+) lie with respect to the (.+)', text)):
    first, second = only(objects, m[1]), only(objects, m[2])
    offsets = {word: offset(word, first, second) for word in ANSWERS['relation']}
    best, next_best = sorted(offsets, key=offsets.get)[:-3:-1]
    assert offsets[best] > max(0.14 * SIDE, 1.5 * offsets[next_best]), 'too close to call'
    return best
  if m := re.fullmatch(r'(?:Is there|Do you see|Does the picture show) a (.+)', text):
    return bool(select(objects, m[1]))
  if m := (re.fullmatch(r'How many (.+?) (?:are there|do you see)', text)
           or re.fullmatch(r'What is the number of (.+)', text)):
    return str(len(select(objects, m[1])))
  if m := (re.fullmatch(r'What (color|shape) is the (.+)', text)
           or re.fullmatch(r'What is the (color|shape) of the (.+)', text)
           or re.fullmatch(r'Which (color|shape) does the (.+) have', text)):
    return word_of(only(objects, m[2]), {'color': COLORS, 'shape': SHAPES}[m[1]])
  if m := (re.fullmatch(r'Where is the (.+)', text)
           or re.fullmatch(r'Which corner is the (.+) closest to', text)
           or re.fullmatch(r'Which quarter of the picture holds the (.+)', text)):
    x, y = center(only(objects, m[1]))
    assert min(abs(x - SIDE / 2), abs(y - SIDE / 2)) > 0.08 * SIDE, 'too close to call'
    return f'{"top" if y < SIDE / 2 else "bottom"} {"left" if x < SIDE / 2 else "right"}'
  raise AssertionError(f'no such question: {question}')


def test_every_answer_is_true_and_unambiguous(train):
  for e in train:
    truth = answer(e.question, facts(e))
    if isinstance(truth, bool):
      truth = 'yes' if truth else 'no'
    assert e.answers == (truth,), e.question
    assert e.answers[0] in ANSWERS[e.question_type]
    assert len(e.question.split()) <= 14


def test_reasons_state_the_evidence(train):
  numbers = ('no', 'one', 'two', 'three', 'four')
  for e in train:
    objects = facts(e)
    if e.question_type == 'relation':
      m = re.fullmatch(r'The (.+) is (left|right|above|below)(?: of)? the (.+)\.', e.reason)
      assert m[2] == e.answers[0]
      assert offset(m[2], only(objects, m[1]), only(objects, m[3])) > 0, e.reason
    elif e.question_type == 'count':
      m = re.match(r'There (?:is|are) (\w+) ([\w ]+)[.:]', e.reason)
      assert len(select(objects, m[2])) == numbers.index(m[1]) == int(e.answers[0]), e.reason
    elif e.question_type == 'existence':
      m = re.match(r'There is (a|no) ([\w ]+)[.,]', e.reason)
      assert bool(select(objects, m[2])) == (m[1] == 'a') == (e.answers[0] == 'yes'), e.reason
    elif m := re.fullmatch(r'There (?:is|are) (\w+) (.+) and (\w+) (.+)\.', e.reason):
      for number, phrase in ((m[1], m[2]), (m[3], m[4])):
        assert len(select(objects, phrase)) == numbers.index(number), e.reason
    elif e.question_type == 'comparison':
      m = re.fullmatch(r'The (.+) is (?:a )?(\w+) and the (.+) is (?:a )?(\w+)\.', e.reason)
      assert m[2] in only(objects, m[1])[0] and m[4] in only(objects, m[3])[0], e.reason
    else:
      assert e.reason.endswith(f' {e.answers[0]}.')


def test_captions_name_every_object_and_a_true_relation(train):
  numbers = ('a', 'two', 'three', 'four', 'five', 'six')
  for e in train[:1000]:
    objects = facts(e)
    names, _, relation = e.captions[0].removesuffix('.').partition('. ')
    named = 0
    for item in re.split(', | and ', names.lower()):
      number, phrase = item.split(' ', 1)
      assert len(select(objects, phrase)) == numbers.index(number) + 1, e.captions
      named += numbers.index(number) + 1
    assert named == len(objects)
    if len(objects) == 1:
      assert not relation
      continue
    m = re.fullmatch(r'(the|a) (.+) is (left of|right of|above|below) (the|a|another) (.+)',
                     relation.lower())
    first, second = select(objects, m[2]), select(objects, m[5])
    assert (m[1] == 'the') == (len(first) == 1) and (m[4] == 'the') == (len(second) == 1)
    axis = m[3] in ('above', 'below')
    sign = 1 if m[3] in ('left of', 'above') else -1
    assert any(sign * (center(b)[axis] - center(a)[axis]) > 0 for a in first for b in second)


def most_alike(mask, corner, width, zoom=8):
  """The shape whose Pillow drawing in this square box overlaps the mask best."""
  outlines = {
      'square': [(0, 0), (1, 0), (1, 1), (0, 1)], 'triangle': [(0.5, 0), (1, 1), (0, 1)],
      'circle': [(0.5 + np.cos(a) / 2, 0.5 + np.sin(a) / 2) for a in np.linspace(0, 6.28, 40)],
      'cross': [(0.3, 0), (0.7, 0), (0.7, 0.3), (1, 0.3), (1, 0.7), (0.7, 0.7), (0.7, 1),
                (0.3, 1), (0.3, 0.7), (0, 0.7), (0, 0.3), (0.3, 0.3)]}
  large = mask.repeat(zoom, 0).repeat(zoom, 1)
  overlap = {}
  for shape, outline in outlines.items():
    canvas = Image.new('1', large.shape[::-1])
    points = [tuple(zoom * (corner + width * np.array(point))) for point in outline]
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    drawn = np.array(canvas)
    overlap[shape] = (drawn & large).sum() / (drawn | large).sum()
  return max(overlap, key=overlap.get)


@pytest.mark.parametrize('side', [48, 80])
def test_pictures_show_the_objects_in_their_boxes(side):
  source = Shapes('val', size=100, image_size=side)
  hues = {'red': 0, 'yellow': 51, 'green': 130, 'cyan': 185, 'blue': 230, 'purple': 284}
  for e, scene in ((source[i], source.scene(i)) for i in range(len(source))):
    assert e.image.shape == (side, side, 3) and e.image.dtype == np.uint8
    pixels = e.image.astype(float)
    contrast = abs(pixels - np.median(pixels, axis=(0, 1))).sum(-1)
    labels, number = ndimage.label(contrast > 60, np.ones((3, 3)))
    assert number == len(e.objects) == len(scene.objects)  # So they do not touch.
    for o, node in zip(e.objects, scene.objects):
      assert o.name == f'{node.color} {node.shape}' and o.box == node.box
      x, y = node.center
      label = labels[int(y), int(x)]
      inside = labels == label
      rows, columns = ndimage.find_objects(labels)[label - 1]
      found = np.array([columns.start, rows.start, columns.stop, rows.stop])
      wanted = np.array([*o.box[:2], o.box[0] + o.box[2], o.box[1] + o.box[3]])
      assert abs(found - wanted).max() < 1, (o, found)
      assert wanted.min() >= 0 and wanted.max() <= side
      color = np.median(pixels[inside], axis=0) / 255
      distance = abs(360 * colorsys.rgb_to_hsv(*color)[0] - hues[node.color])
      assert min(distance, 360 - distance) < 20, o
      core = inside & (contrast > np.median(contrast[inside]) / 2)  # Edges cut in the middle.
      if node.size == 'large' or side > 48:
        corner = (o.box[0] - columns.start, o.box[1] - rows.start)
        assert most_alike(core[rows, columns], corner, o.box[2]) == node.shape, o


def test_a_record_depends_on_nothing_but_its_own_index():
  source = Shapes('val', size=100, seed=3)
  late, again = source[70], Shapes('val', size=71, seed=3)[70]
  np.testing.assert_array_equal(late.image, again.image)
  assert (late.question, late.answers, late.captions, late.objects, late.reason) == (
      again.question, again.answers, again.captions, again.objects, again.reason)
  assert late.question_id == 70 and len(source) == 100
  doubled = Shapes('val', size=100, image_size=96, seed=3)[70]
  assert doubled.question == late.question
  np.testing.assert_allclose([o.box for o in doubled.objects],
                             2 * np.array([o.box for o in late.objects]))
  assert [o.box for o in Shapes('val', size=100, seed=4)[70].objects] != [
      o.box for o in late.objects]
  with pytest.raises(IndexError):
    source[100]


def test_splits_and_seeds_share_no_scene():
  seen = collections.Counter()
  for split, seed in (('train', 0), ('val', 0), ('test', 0), ('train', 1)):
    source = Shapes(split, size=2000, seed=seed)
    for i in range(len(source)):  # Scenes that differ by less than 0.1 pixel count as one.
      seen[frozenset((o.color, o.shape, *np.round(o.box, 1)) for o in source.scene(i).objects)] += 1
  assert max(seen.values()) == 1


@pytest.mark.parametrize('arguments, word', [
    (dict(split='validation', size=1), 'validation'), (dict(split='val', size=0), 'size is 0'),
    (dict(split='val', size=1, image_size=8), 'image_size is 8')])
def test_mistakes_are_named_in_one_line(arguments, word):
  with pytest.raises(UserError) as error:
    Shapes(**arguments)
  assert word in str(error.value) and '\n' not in str(error.value)


def test_families_and_their_answers_are_equally_frequent(train):
  families = collections.Counter(e.question_type for e in train)
  assert stats.chisquare([families[f] for f in ANSWERS]).pvalue > 1e-3
  assert families.total() == sum(families[f] for f in ANSWERS)
  for family, answers in ANSWERS.items():
    # Half of the comparisons are of colors, half of shapes.
    for kind in (COLORS, SHAPES) if family == 'comparison' else (answers,):
      found = collections.Counter(e.answers[0] for e in train
                                  if e.question_type == family and e.answers[0] in kind)
      assert stats.chisquare([found[a] for a in kind]).pvalue > 1e-3, (family, found)


def histogram(example):
  """Features of the picture alone: the number of objects of every kind."""
  things = facts(example)
  sorts = [{c, s} for c in COLORS for s in SHAPES] + [{w} for w in (*COLORS, *SHAPES, 'large')]
  counts = [sum(sort <= words for words, _ in things) for sort in sorts]
  return counts + sorted(counts[24:30]) + sorted(counts[30:34]) + [len(things)]


def test_neither_the_question_nor_the_picture_gives_the_answer_away(train):
  source = Shapes('val', size=1400, image_size=SIDE)
  val = [source[i] for i in range(len(source))]
  answers, truth = (np.array([e.answers[0] for e in part]) for part in (train, val))
  words = CountVectorizer(ngram_range=(1, 2))
  asked = words.fit_transform([e.question for e in train])
  seen, seen_val = (np.array([histogram(e) for e in part], float) for part in (train, val))
  guess = LogisticRegression(C=0.03, max_iter=100).fit(asked, answers).predict(
      words.transform([e.question for e in val]))
  assert (guess == truth).mean() < 0.4
  groups, groups_val = (np.array([e.question_type for e in part]) for part in (train, val))
  for family, choices in ANSWERS.items():
    rows, rows_val = groups == family, groups_val == family
    # Three standard deviations of the accuracy of a random guess.
    chance = 1 / 2 if family == 'comparison' else 1 / len(choices)  # It names two.
    limit = chance + 3 * np.sqrt(chance * (1 - chance) / rows_val.sum())
    assert (guess == truth)[rows_val].mean() < limit, family
    if family == 'comparison':  # Without the question, the two objects are unknown.
      model = LogisticRegression(C=0.01, max_iter=100).fit(seen[rows], answers[rows])
      assert model.score(seen_val[rows_val], truth[rows_val]) < chance
    if choices == ('yes', 'no'):
      model = LogisticRegression(C=0.01, max_iter=100).fit(seen[rows], answers[rows])
      assert model.score(seen_val[rows_val], truth[rows_val]) < limit, family
